"""Peak memory: how far the resident memory of a fresh process grows while a function runs.

On Linux the kernel records the peak (VmHWM, reset through /proc/self/clear_refs). On other systems a thread samples the
resident memory every 5 ms.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil

INTERVAL = 0.005  # seconds between two samples
PRELOADED = ["torch.nn.attention.bias", "softprompt_kernels.ops", "softprompt_kernels.bench.footprint", "psutil"]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module-level function in a process that has only imported modules, and return its result.

    Where the system has a fork server, the process is a copy of one that has imported PyTorch and this package. This
    saves a second a call.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, most likely because memory ran out.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
        _start_fork_server()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _start_fork_server() -> None:
    """Start the fork server, once, with this process's search path.

    By itself it would look for modules in the working folder first, and in a checkout of this package find another one
    than the one that is installed.
    """
    from multiprocessing import forkserver

    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    settings = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class PeakResident:
    """`with PeakResident() as peak: ...`, then `peak.growth`: peak resident bytes, minus those at the start."""

    growth: int

    def __enter__(self) -> PeakResident:
        self._process = psutil.Process()
        self._by_kernel = _reset_high_water()
        self._before = self._highest = self._process.memory_info().rss
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if not self._by_kernel:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._by_kernel:
            self._highest = _high_water()
        else:
            self._ended.set()
            self._sampler.join()
        self.growth = self._highest - self._before

    def _sample(self) -> None:
        while True:
            self._highest = max(self._highest, self._process.memory_info().rss)
            if self._ended.wait(INTERVAL):
                return


def _reset_high_water() -> bool:
    """Reset the kernel's high-water mark of resident memory; returns whether the kernel has one."""
    try:
        RESET.write_text("5")
        return _high_water() > 0
    except (OSError, StopIteration):
        return False


def _high_water() -> int:
    """The high-water mark in bytes; the kernel writes "VmHWM:  123 kB"."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def release_freed_memory() -> None:
    """Return freed memory to the system. Otherwise later allocations would reuse it, and no growth would be seen."""

    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
