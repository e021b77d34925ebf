"""A file that exists only when it is complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError


@contextmanager
def written_when_complete(target: Path | None) -> Iterator[Path | None]:
    """A temporary file beside the target, renamed to it at the end, or removed after an exception.

    Its name ends as the target's does. None: no file.

    Raises:
        SoftPromptError: the target cannot be written. Before the body runs.
    """
    if target is None:
        yield None
        return
    temporary = _create(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _create(target: Path) -> Path:
    if target.is_dir():
        raise SoftPromptError(f"trace: got {target}, which is a folder; accepted is a file such as {target}/trace.json")
    if not target.parent.is_dir():
        raise SoftPromptError(f"trace: got {target}, but {target.parent} is not a folder")
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=f"-{target.name}")
    except OSError as error:
        raise SoftPromptError(f"trace: {target.parent} cannot be written to ({error.strerror})") from error
    os.chmod(descriptor, 0o666 & ~_umask())
    os.close(descriptor)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
