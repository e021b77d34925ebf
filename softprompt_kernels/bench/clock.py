"""A clock that stands still while the calling thread waits for a CPU.

Where more threads are ready than there are CPUs, the system lets each run for some milliseconds and then wait for many.
Such a wait says nothing about the code. Linux counts it for each thread, as the second number in
`/proc/self/task/ID/schedstat` (Documentation/scheduler/sched-stats.rst), in nanoseconds. This clock subtracts it. Other
waits count: for a barrier, a lock, the disk or a GPU. So do waits of other threads, as far as the calling one waits for
them. On systems without this file it is `time.perf_counter`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress


class RunClock:
    """`with RunClock() as now: begin = now(); ...; seconds = now() - begin`, all in one thread."""

    def __enter__(self) -> Callable[[], float]:
        self._file = None
        with suppress(OSError):
            self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
            with suppress(OSError, ValueError, IndexError):
                self._waited()
                return self._now
        return time.perf_counter

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def _waited(self) -> int:
        """Nanoseconds that the thread has waited for a CPU."""
        assert self._file is not None
        return int(os.pread(self._file, 80, 0).split()[1])

    def _now(self) -> float:
        before = self._waited()
        while True:  # until there was no wait between reading the two clocks
            now = time.perf_counter()
            after = self._waited()
            if before == after:
                return now - 1e-9 * after
            before = after
