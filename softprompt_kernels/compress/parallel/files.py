"""Files that several ranks write in one folder: each under names of its own, numbered through when all are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from softprompt_kernels.compress.parallel import ranks


def own_file(path: Path) -> Path:
    """The name under which this rank writes a file until `number_files`; the path itself for a process alone."""
    return path if ranks.world() == 1 else path.with_name(f"{path.stem}-of-{ranks.rank()}{path.suffix}")


def number_files(count: int, final: Callable[[int], Path]) -> tuple[int, int]:
    """Number the files of all ranks through: those of rank 0 first.

    Args:
        count: how many files this rank has, `own_file(final(0))` and so on.
        final: the path of a number.

    Returns:
        The number of this rank's first file, and how many there are.
    """
    counts = ranks.gather(count)
    first = sum(counts[: ranks.rank()])
    for number in range(count):
        if own_file(final(number)) != final(first + number):
            os.replace(own_file(final(number)), final(first + number))
    return first, sum(counts)
