"""A contest: several ways of doing the same work, checked against each other, then timed in turns.

pytest-benchmark times one function after another, and on a shared machine whatever slows it for a minute would then
fall on one of them. So one benchmark is one whole contest: in a round every way has a turn, each round starting with
another one, and it is the ways' own times that the report is made of. They go where pytest-benchmark has room for what
it does not know, `benchmark.extra_info`; its own statistics are those of a round.

Where a way takes milliseconds, what the one before left of the caches, of its own code among them, and in the allocator
is a good part of that. So in such a contest each way runs twice in its turn, and the second time counts; the first is
kept beside it, as it is what one call costs in the midst of other work. (One way at growing sizes runs once: what the
cache holds of the small ones would bend the line.)

Floors take part in each round too, as does a product of two square matrices, `RULER`: its rate is what "% of mm" means.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.machine import OtherLoad

OURS = "ours"
ALTERNATIVE = "alternative"  # another way to the same results
FLOOR = "floor"  # the bare products
TWIN = "twin"  # ours on another problem, for a ratio
RULER = "ruler"
RULER_SIZE, QUICK_RULER_SIZE = 1024, 64
TWICE_BELOW = 0.02  # seconds that the fastest way takes

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Entry:
    """One way.

    Args:
        name: of the way.
        role: OURS (exactly one in a contest), ALTERNATIVE, FLOOR, TWIN or RULER.
        run: does the work once.
        flop: useful FLOP of a run, None where products are not what it is about.
        peak_bytes: at most in memory above the inputs, None if not measured.
    """

    name: str
    role: str
    run: Callable[[], Results]
    flop: float | None = None
    peak_bytes: int | None = None


def ruler(quick: bool) -> Entry:
    """A product of two square matrices in fp32, into memory that is there."""
    size = QUICK_RULER_SIZE if quick else RULER_SIZE
    left, right, out = (torch.rand(size, size) for _ in range(3))
    return Entry(f"mm {size}³", RULER, lambda: (torch.mm(left, right, out=out),), 2 * size**3)


@dataclass(frozen=True)
class Contest:
    """Entries, and how far apart results may be, ‖difference‖ / ‖ours‖; None: they were checked, and run, before."""

    entries: list[Entry]
    tolerance: float | None

    def check(self) -> dict[str, float]:
        """The largest difference of each alternative; also the warm-up of all entries.

        Raises:
            AssertionError: one differs by more than the tolerance, and what it would be timed at means nothing.
        """
        if self.tolerance is None:
            return {}
        (ours,) = [entry for entry in self.entries if entry.role == OURS]
        expected = [result.detach().clone() for result in ours.run()]
        differences = {}
        for entry in self.entries:
            found = entry.run()
            if entry.role != ALTERNATIVE:
                continue
            difference = max(_difference(one, other) for one, other in zip(found, expected, strict=True))
            assert difference <= self.tolerance, f"{entry.name}: differs by {difference:.1e}, not {self.tolerance:.0e}"
            differences[entry.name] = difference
        return differences

    def round(self, times: Times, twice: bool) -> None:
        """Each entry once, or twice in its turn, appending to its times."""
        turn = min(map(len, times.counted.values())) % len(self.entries)
        for entry in (*self.entries[turn:], *self.entries[:turn]):
            if twice:
                times.after_others[entry.name].append(_seconds(entry))
            times.counted[entry.name].append(_seconds(entry))


@dataclass(frozen=True)
class Times:
    """Seconds of each entry, round by round: those that count, and, where it runs twice, of the first run."""

    counted: dict[str, list[float]]
    after_others: dict[str, list[float]]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Times:
        """None yet."""
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


def hold(benchmark: Any, contest: Contest, *, seconds: float, most: int, quick: bool) -> dict[str, Any]:
    """Check, then time in turns; the record of it, which is in the benchmark's `extra_info` too.

    Args:
        benchmark: pytest-benchmark's fixture.
        contest: the ways.
        seconds: about how long; at least 3 rounds, at most `most`, one if `quick`.
        most, quick: see there.
    """
    contest = replace(contest, entries=[*contest.entries, ruler(quick)])
    differences = contest.check()
    times = Times.of(contest.entries)
    rounds, twice = 1, quick
    with OtherLoad() as load:
        if not quick:
            begin = time.perf_counter()
            contest.round(times, False)
            passed = time.perf_counter() - begin
            compared = [entry.name for entry in contest.entries if entry.role in (OURS, ALTERNATIVE)]
            twice = min((times.counted[name][0] for name in compared), default=math.inf) < TWICE_BELOW
            rounds = min(most, max(3, int(seconds / (passed * (2 if twice else 1))))) - (0 if twice else 1)
            times = Times.of(contest.entries) if twice else times
        gc.collect()
        benchmark.pedantic(contest.round, args=(times, twice), rounds=rounds, iterations=1)
    ruled = _of(contest, RULER)
    record = {
        "rounds": min(map(len, times.counted.values())),
        "other_load": load.share,
        "mm_gflops": ruled.flop / median(times.counted[ruled.name]) * 1e-9,
        "entries": [_record(entry, times, differences.get(entry.name)) for entry in contest.entries],
    }
    benchmark.extra_info.update(record)
    return record


def _of(contest: Contest, role: str) -> Any:
    return next(entry for entry in contest.entries if entry.role == role)


def _record(entry: Entry, times: Times, difference: float | None) -> dict[str, Any]:
    seconds, after_others = times.counted[entry.name], times.after_others[entry.name]
    return {
        "name": entry.name,
        "role": entry.role,
        "flop": entry.flop,
        "median": median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "seconds": seconds,
        "after_others": median(after_others) if after_others else None,
        "peak_bytes": entry.peak_bytes,
        "difference": difference,
    }
