"""The machine that was measured on: processor, threads, PyTorch, and the load of other processes meanwhile."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from types import TracebackType

import torch

from softprompt_kernels.ops.dispatch import available_backends


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts() -> dict[str, object]:
    """What a reader of the figures has to know of the machine, for JSON."""
    return {
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backends": [backend.name for backend in available_backends() if backend.available],
    }


def describe(facts: dict[str, object]) -> str:
    """The `facts` in one line."""
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{facts['processor']} ({facts['vectors']}), {threads}, torch {facts['torch']}"


class OtherLoad:
    """`with OtherLoad() as load: ...`, then `load.share`: the share of all CPU time that other processes took.

    Above a few percent, times mean little: an op waits for all its threads, and so for the one that was delayed.
    """

    share: float

    def __enter__(self) -> OtherLoad:
        self._begin, self._before = time.perf_counter(), _busy_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        passed = (time.perf_counter() - self._begin) * (os.cpu_count() or 1)
        self.share = max(0.0, _busy_seconds() - self._before) / passed


def _busy_seconds() -> float:
    """CPU seconds of all processes but this one, over all processors."""
    import psutil  # of the extra `bench`; the rest here does without

    every, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = every.idle + getattr(every, "iowait", 0.0) + getattr(every, "guest", 0.0)
    return sum(every) - idle - own.user - own.system
