"""Times on a GPU: the device's own clock, medians over rounds in which all ways take turns, a cold L2 cache each time.

    before a run    the cache is filled with something else: twice its size is written
    a run           lies between two events on the stream: what Python does meanwhile counts only where the device has
                    to wait for it
    warm-up         a run of each way first compiles and allocates

What talks to the device is in `Cuda`, so that all else can be tested without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

import torch

Run = Callable[[], Any]


class Device(Protocol):
    """What is asked of a GPU."""

    def flush(self) -> None:
        """Leaves nothing of earlier runs in the cache."""

    def event(self) -> Any:
        """A mark on the stream, here."""

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks, waiting for the second."""

    def peak(self, run: Run) -> int:
        """Bytes that a run has at most beyond those before it."""


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

    def between(self, begin: Any, end: Any) -> float:
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


def medians(device: Device, ways: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    for run in ways.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(rounds):
        first = turn % len(order)
        for name in (*order[first:], *order[:first]):
            device.flush()
            begin = device.event()
            result = ways[name]()
            times[name].append(device.between(begin, device.event()))
            del result
    return {name: median(found) for name, found in times.items()}
