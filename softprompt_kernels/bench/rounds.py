"""Compares implementations of the same work: checks that their results agree, then times them in turns.

pytest-benchmark times one function after another. On a shared machine, a slow minute would then hit only one of the
implementations. Here one benchmark is one whole comparison. In each round every implementation has a turn, and each
round starts with another one. The report uses the times of the implementations. They are stored in
`benchmark.extra_info`; pytest-benchmark's own statistics are those of a round.

Where an implementation takes milliseconds, its time depends on what the implementation before it left in the caches
(also of code) and in the allocator. In such a comparison each implementation runs twice in its turn:

    cold    the first run, right after another implementation: what a single call costs between other work
    warm    the second run: the time that the report compares

Where all take longer, each runs once. So do the growing sizes of the suite `scaling`: there a warm cache would help
only the small sizes, and the curve would bend.

Two more entries have a turn in each round: the floors, and a reference GEMM of two square matrices. The column
"% of GEMM" is relative to the rate of that GEMM.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from softprompt_kernels.bench.machine import OtherLoad

OURS = "ours"
BASELINE = "baseline"  # another implementation of the same work
FLOOR = "floor"  # the bare GEMMs
PAIRED_VARIANT = "paired variant"  # ours on another problem (dtype or size), for a ratio of the two
REFERENCE_GEMM = "reference GEMM"
REFERENCE_SIZE, QUICK_REFERENCE_SIZE = 1024, 64
RUN_TWICE_BELOW = 0.02  # seconds of the fastest implementation

Results = Sequence[Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One implementation in a comparison.

    Args:
        name: as the report shows it.
        role: OURS (exactly one in a comparison of results), BASELINE, FLOOR, PAIRED_VARIANT or REFERENCE_GEMM.
        run: does the work once.
        flop: useful FLOP of a run; None where the work is not made of GEMMs.
        peak_bytes: peak memory above the inputs; None if it was not measured.
    """

    name: str
    role: str
    run: Callable[[], Results]
    flop: float | None = None
    peak_bytes: int | None = None


def in_turns(entries: Sequence[T], turn: int) -> list[T]:
    """The entries, starting with another one each turn."""
    first = turn % len(entries)
    return [*entries[first:], *entries[:first]]


def reference_gemm(quick: bool) -> Entry:
    """`torch.mm` of two square fp32 matrices into an existing output."""
    size = QUICK_REFERENCE_SIZE if quick else REFERENCE_SIZE
    a, b, out = (torch.rand(size, size) for _ in range(3))
    return Entry(f"mm {size}³", REFERENCE_GEMM, lambda: (torch.mm(a, b, out=out),), 2 * size**3)


@dataclass(frozen=True)
class Comparison:
    """Entries that are timed together.

    Args:
        entries: the implementations.
        tolerance: the largest accepted ‖difference‖ / ‖ours‖ of a baseline's results; None: the caller has checked
            and run all entries before.
    """

    entries: list[Entry]
    tolerance: float | None

    def check(self) -> dict[str, float]:
        """Run each entry once, which is also the warm-up; returns the largest difference of each baseline.

        Raises:
            AssertionError: a baseline differs by more than the tolerance. Its time would mean nothing.
        """
        if self.tolerance is None:
            return {}
        (ours,) = [entry for entry in self.entries if entry.role == OURS]
        expected = [result.detach().clone() for result in ours.run()]
        differences = {}
        for entry in self.entries:
            found = entry.run()
            if entry.role != BASELINE:
                continue
            difference = max(_difference(one, other) for one, other in zip(found, expected, strict=True))
            assert difference <= self.tolerance, (
                f"{entry.name}: results differ by {difference:.1e}, accepted is {self.tolerance:.0e}"
            )
            differences[entry.name] = difference
        return differences

    def round(self, times: Times, twice: bool) -> None:
        """Run each entry once, or twice in its turn, and append to its times."""
        for entry in in_turns(self.entries, min(map(len, times.reported.values()))):
            if twice:
                times.cold[entry.name].append(_seconds(entry))
            times.reported[entry.name].append(_seconds(entry))


@dataclass(frozen=True)
class Times:
    """Seconds of each entry, one number a round.

    Args:
        reported: the last run of each turn: the warm one where an entry runs twice, else the only one.
        cold: the first of two runs; empty where an entry runs once.
    """

    reported: dict[str, list[float]]
    cold: dict[str, list[float]]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Times:
        """No times yet."""
        return cls({entry.name: [] for entry in entries}, {entry.name: [] for entry in entries})


def _seconds(entry: Entry) -> float:
    begin = time.perf_counter()
    results = entry.run()
    passed = time.perf_counter() - begin
    del results
    return passed


def _difference(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖; infinite where either is not finite."""
    one, other = one.detach().double(), other.double()
    distance = float((one - other).norm() / other.norm().clamp_min(1e-30))
    return distance if distance < float("inf") else float("inf")


def check_and_time(
    benchmark: Any, comparison: Comparison, *, seconds: float, max_rounds: int, quick: bool
) -> dict[str, Any]:
    """Check the results, then time all entries in turns; returns the record, which also goes to `extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        comparison: the implementations; the reference GEMM is added here.
        seconds: about how long to measure. There are at least 3 rounds.
        max_rounds: the largest number of rounds.
        quick: one round, whatever `seconds` says.
    """
    comparison = replace(comparison, entries=[*comparison.entries, reference_gemm(quick)])
    differences = comparison.check()
    times = Times.of(comparison.entries)
    rounds, twice = 1, quick
    with OtherLoad() as load:
        if not quick:
            # A first round says how long a round takes. It counts as one where each entry runs once.
            begin = time.perf_counter()
            comparison.round(times, False)
            passed = time.perf_counter() - begin
            compared = [entry.name for entry in comparison.entries if entry.role in (OURS, BASELINE)]
            twice = min((times.reported[name][0] for name in compared), default=math.inf) < RUN_TWICE_BELOW
            rounds = min(max_rounds, max(3, int(seconds / (passed * (2 if twice else 1))))) - (0 if twice else 1)
            times = Times.of(comparison.entries) if twice else times
        gc.collect()
        benchmark.pedantic(comparison.round, args=(times, twice), rounds=rounds, iterations=1)
    reference = _entry_of_role(comparison, REFERENCE_GEMM)
    record = {
        "rounds": min(map(len, times.reported.values())),
        "other_load": load.share,
        "reference_gflops": reference.flop / median(times.reported[reference.name]) * 1e-9,
        "entries": [_record(entry, times, differences.get(entry.name)) for entry in comparison.entries],
    }
    benchmark.extra_info.update(record)
    return record


def _entry_of_role(comparison: Comparison, role: str) -> Any:
    return next(entry for entry in comparison.entries if entry.role == role)


def _record(entry: Entry, times: Times, difference: float | None) -> dict[str, Any]:
    seconds, cold = times.reported[entry.name], times.cold[entry.name]
    return {
        "name": entry.name,
        "role": entry.role,
        "flop": entry.flop,
        "median": median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "seconds": seconds,
        "cold": median(cold) if cold else None,
        "peak_bytes": entry.peak_bytes,
        "difference": difference,
    }
