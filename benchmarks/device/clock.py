"""Times on a GPU: by the device's own clock, medians over rounds in which all implementations take turns.

    warm-up         each implementation runs once before, which compiles and allocates
    before a run    twice the size of the L2 cache is written, so that each run starts with a cold cache
    a run           lies between two events on the stream; Python's time counts only where the device waits for it

Only `Cuda` talks to the device, so everything else can be tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

import torch

Run = Callable[[], Any]


class Device(Protocol):
    """What the clock needs of a GPU."""

    def flush(self) -> None:
        """Overwrite the L2 cache, so that nothing of earlier runs is left in it."""

    def event(self) -> Any:
        """Record an event on the stream."""

    def elapsed(self, begin: Any, end: Any) -> float:
        """Wait for the second event; returns the milliseconds between the two."""

    def peak(self, run: Run) -> int:
        """Peak bytes allocated during a run, above those allocated before it."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._filler = torch.empty(2 * cache, dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        self._filler.zero_()

    def event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before


def medians(device: Device, implementations: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each implementation, by name."""
    for run in implementations.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in implementations}
    order = list(implementations)
    for turn in range(rounds):
        first = turn % len(order)
        for name in (*order[first:], *order[:first]):
            device.flush()
            begin = device.event()
            result = implementations[name]()
            times[name].append(device.elapsed(begin, device.event()))
            del result
    return {name: median(found) for name, found in times.items()}
