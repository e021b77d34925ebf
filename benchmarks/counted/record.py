"""The counts of one implementation for one problem, and one run that is counted.

Problems in the interpreter are small, and so is the GPU that they are planned for: `small_gpu(16)` has 16
multiprocessors. A wave of programs in triton_traffic.py has the same size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.counted.aten_traffic import AtenTraffic
from benchmarks.counted.triton_traffic import Traffic
from softprompt_kernels.kernels.triton import targets

MULTIPROCESSORS = 16
OURS, PEER, PYTORCH = "ours", "peer", "PyTorch"


@dataclass
class Count:
    """The counts of one implementation for one problem. Bytes include reads and writes."""

    suite: str
    case: str
    implementation: str
    role: str
    floor: int
    missed: int  # bytes that the kernels move past the L2 cache, by the model of triton_traffic.py
    issued: int  # bytes that the kernels' programs ask for
    aten: int  # bytes of PyTorch's operations
    flop: int
    exponentials: int
    atomics: int
    launches: int  # of kernels
    operations: int  # of PyTorch
    peak: int  # most bytes that were allocated during the run and are alive together
    dtype: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Bytes between memory and chip, by the model."""
        return self.missed + self.aten

    def record(self) -> dict[str, Any]:
        """The counts for JSON. The op is the first word of the suite."""
        derived = {"op": self.suite.split()[0], "moved": self.moved, "times_floor": self.moved / self.floor}
        return asdict(self) | derived


def count(
    suite: str, case: str, implementation: str, role: str, floor: int, run: Callable[[], Any], *, cached: bool = True
) -> Count:
    """Run an implementation once, in the interpreter, and count.

    `cached` says whether the model of the L2 cache in triton_traffic.py holds. Otherwise all that is issued is moved.
    """
    gc.collect()
    with small_gpu(), AtenTraffic() as aten, Traffic(MULTIPROCESSORS) as traffic:
        run()
    made = Count(
        suite,
        case,
        implementation,
        role,
        floor,
        traffic.total("missed" if cached else "issued"),
        traffic.total("issued"),
        aten.read + aten.written,
        traffic.total("flop") + aten.flop,
        traffic.total("exponentials") + aten.exponentials,
        traffic.total("atomics"),
        len(traffic.launches),
        aten.operations,
        aten.peak,
    )
    made.more["kernels"] = kernels(traffic)
    return made


def kernels(traffic: Traffic) -> list[dict[str, Any]]:
    return [
        {
            "kernel": launch.kernel,
            "programs": launch.programs,
            "tensors": {name: asdict(figures) for name, figures in launch.tensors.items()},
        }
        for launch in traffic.launches
    ]


@contextmanager
def small_gpu(multiprocessors: int = MULTIPROCESSORS) -> Iterator[None]:
    """Make the drivers in the interpreter plan for a GPU with this number of multiprocessors."""
    name = targets.target_of(torch.device("cpu")).name
    before = targets.TARGETS[name]
    targets.TARGETS[name] = replace(before, multiprocessors=multiprocessors)
    targets.target_of.cache_clear()
    try:
        yield
    finally:
        targets.TARGETS[name] = before
        targets.target_of.cache_clear()


def left_out(suite: str, case: str, implementation: str, role: str, floor: int, reason: str) -> Count:
    """An implementation that is not counted, and why."""
    return Count(suite, case, implementation, role, floor, *[0] * 9, more={"left_out": reason})
