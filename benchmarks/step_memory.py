"""Peak memory of a side: how far the resident memory of a fresh process grows above the loaded model.

"Loaded" means that one token has been through the model, so that its weights are resident and the libraries have been
set up. What comes after counts: the prompt, the optimiser, activations, logits, gradients, and the pages of
memory-mapped moments that are read.

On Linux the kernel keeps the peak (VmHWM, set back through /proc/self/clear_refs); elsewhere a thread looks every 5 ms.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import peft  # noqa: F401  imported before memory is looked at: both sides have it loaded
import psutil
import torch
from step_problem import Problem
from step_sides import SIDES

STEPS = 2  # the second one finds the optimiser's state
INTERVAL = 0.005
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(side: str, problem: Problem) -> int:
    """Bytes above the loaded model that `side` needs, measured in a process of its own.

    Raises:
        concurrent.futures.process.BrokenProcessPool: that process was killed, as by a system without memory left.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_here, side, problem).result()


def _peak_here(side: str, problem: Problem) -> int:
    torch.set_num_threads(problem.threads)
    way = SIDES[side]
    model = way.load(problem.model)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    give_back_freed()
    with PeakResident() as peak:
        training = way(problem, model)
        for _ in range(STEPS):
            training.step()
    return peak.growth


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
    """Let the allocator return what was freed while loading: else later growth would hide in it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
