"""Peak memory: how far the resident memory of a fresh process grows while something runs.

On Linux the kernel keeps the peak (VmHWM, set back through /proc/self/clear_refs); elsewhere a thread looks every 5 ms.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil

INTERVAL = 0.005
PRELOADED = ["torch.nn.attention.bias", "softprompt_kernels.ops", "psutil"]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns, called in a process that has done nothing but import.

    Where the system can, it is the copy of a process that has imported PyTorch and this package: a second less each.

    Raises:
        concurrent.futures.process.BrokenProcessPool: that process was killed, as by a system without memory left.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class PeakResident:
    """`with PeakResident() as peak: ...`, then `peak.growth`: bytes of resident memory at most, less those before."""

    growth: int

    def __enter__(self) -> PeakResident:
        self._process = psutil.Process()
        self._by_kernel = _reset_high_water()
        self._before = self._highest = self._process.memory_info().rss
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if not self._by_kernel:
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._by_kernel:
            self._highest = _high_water()
        else:
            self._ended.set()
            self._watcher.join()
        self.growth = self._highest - self._before

    def _watch(self) -> None:
        while True:
            self._highest = max(self._highest, self._process.memory_info().rss)
            if self._ended.wait(INTERVAL):
                return


def _reset_high_water() -> bool:
    """Whether the kernel keeps a high-water mark that starts now."""
    try:
        RESET.write_text("5")
        return _high_water() > 0
    except (OSError, StopIteration):
        return False


def _high_water() -> int:
    """Bytes, as the kernel says it: "VmHWM:  123 kB"."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def give_back_freed() -> None:
    """Let the allocator return what was freed so far: else later growth would hide in it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
