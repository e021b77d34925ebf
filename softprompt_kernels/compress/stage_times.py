"""The wall-clock seconds of a run's stages, added up over all calls that worked on the run.

    seconds of a stage = those of earlier calls, read from a file, + those of this call

A stage counts when it ends. One that is interrupted adds nothing, unless `replace_earlier` says what was kept of it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softprompt_kernels.compress.sources.queries import write_text


class StageTimes:
    """The times of the stages: `with times("training"): ...` measures one of them."""

    def __init__(self) -> None:
        self._earlier: dict[str, float] = {}
        self._replaced: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._file: Path | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the stage `name`. It does not count if it raises."""
        begin = time.perf_counter()
        yield
        self._now[name] = self._now.get(name, 0.0) + time.perf_counter() - begin
        self._store()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each finished stage, in the order of the stages."""
        earlier = self._earlier | self._replaced
        names = dict.fromkeys((*self._earlier, *self._now))
        return {name: earlier.get(name, 0.0) + self._now.get(name, 0.0) for name in names}

    @property
    def total(self) -> float:
        """The seconds of all stages."""
        return sum(self.seconds.values())

    def keep_in(self, file: Path) -> None:
        """Add the seconds that earlier calls stored in `file`, and store all seconds there from now on.

        A file that cannot be read counts as none.
        """
        self._earlier, self._file = _read(file), file
        self._store()

    def replace_earlier(self, name: str, seconds: float) -> None:
        """Set what earlier calls spent on a stage, where something else than the file knows it better."""
        self._replaced[name] = seconds

    def _store(self) -> None:
        if self._file is not None:
            write_text(self._file, json.dumps(self.seconds, indent=1) + "\n")


def _read(file: Path) -> dict[str, float]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    numbers = isinstance(stored, dict) and all(
        isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in stored.values()
    )
    return {name: float(value) for name, value in stored.items()} if numbers else {}
