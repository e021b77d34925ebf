"""What figures were measured on: processor, threads, PyTorch, and how busy others kept it meanwhile."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from types import TracebackType

import psutil
import torch

from softprompt_kernels.ops.dispatch import available_backends


def processor() -> str:
    """Its name, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts() -> dict[str, object]:
    """All that a reader of the figures has to know of the machine."""
    return {
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backends": [backend.name for backend in available_backends() if backend.available],
    }


def describe(known: dict[str, object]) -> str:
    """The same in a line."""
    return f"{known['processor']} ({known['vectors']}), {known['threads']} threads, torch {known['torch']}"


class OtherLoad:
    """`with OtherLoad() as load: ...`, then `load.share`: of all processors' time, what went to other processes.

    Above a few percent, times mean little: whoever waits for all its threads waits for the one that was held up.
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
    """Of all processors, in all processes but this one."""
    every, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = every.idle + getattr(every, "iowait", 0.0) + getattr(every, "guest", 0.0)
    return sum(every) - idle - own.user - own.system
