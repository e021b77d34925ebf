"""Times entries in turns, each between two runs of the reference workload.

A round is: reference, entry, reference, entry, …, reference, and each round starts with another entry. The reference of
an entry is the mean of the one before and the one after it. A measurement is a block of runs that takes at least 5 ms,
and its figure is the fastest of these runs: others find the caches as another process left them. Runs of less than
0.2 ms (on a GPU: 2 ms, since each measurement waits for the device) are timed some at a time. The reference's blocks
are about as long as the entries', up to 100 ms, so that a busy machine slows both alike. Waiting for a CPU does not
count (clock.py).

The first round is a warm-up and does not count.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from softprompt_kernels.bench.clock import RunClock
from softprompt_kernels.bench.rounds import in_turns

BLOCK, LONGEST_REFERENCE = 0.005, 0.1  # seconds
GROUP = {"cpu": 2e-4, "cuda": 2e-3}  # seconds that are timed at least
SHORT, SHORT_RUNS = 0.02, 3  # runs below so many seconds are in blocks of at least so many
MIN_ROUNDS, MAX_ROUNDS = 8, 20


@dataclass(frozen=True)
class Timed:
    """The times of one entry, a number a round, in seconds a run.

    Args:
        runs: runs in a block.
        seconds: of the entry.
        reference_seconds: of the reference beside it.
    """

    runs: int
    seconds: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)


def time_in_turns(
    calls: Sequence[Callable[[], object]],
    reference: Callable[[], object],
    *,
    seconds: float,
    device: torch.device,
    rounds: int | None = None,
) -> list[Timed]:
    """Time all calls, in turns.

    Args:
        calls: what to time; each does its work once. They have run before.
        reference: the workload beside them.
        seconds: about how long to measure, for each call. There are at least 8 rounds and at most 20.
        device: whose work to wait for.
        rounds: the number of rounds, whatever `seconds` says.

    Returns:
        one record a call.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with RunClock() as now:
            return _time_in_turns(calls, _Timer(now, device), reference, seconds, rounds)
    finally:
        if collecting:
            gc.enable()


def _time_in_turns(
    calls: Sequence[Callable[[], object]],
    timer: _Timer,
    reference: Callable[[], object],
    seconds: float,
    rounds: int | None,
) -> list[Timed]:
    once = [timer.shortest(call) for call in calls]
    entries = [Timed(max(SHORT_RUNS if seconds_ < SHORT else 1, math.ceil(BLOCK / seconds_))) for seconds_ in once]
    block = min(median(entry.runs * seconds_ for entry, seconds_ in zip(entries, once, strict=True)), LONGEST_REFERENCE)
    repeats = max(1, math.ceil(max(block, BLOCK) / timer.shortest(reference)))
    work = list(zip(calls, entries, strict=True))
    passed = _round(work, reference, repeats, timer, keep=False)
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds * len(calls) / passed)))
    for turn in range(rounds):
        _round(in_turns(work, turn), reference, repeats, timer, keep=True)
    return entries


def _round(
    work: Sequence[tuple[Callable[[], object], Timed]],
    reference: Callable[[], object],
    repeats: int,
    timer: _Timer,
    keep: bool,
) -> float:
    """Time each call once; returns the seconds of the whole round."""
    begin = time.perf_counter()
    before = timer.block(reference, repeats)
    for call, timed in work:
        seconds = timer.block(call, timed.runs)
        after = timer.block(reference, repeats)
        if keep:
            timed.seconds.append(seconds)
            timed.reference_seconds.append((before + after) / 2)
        before = after
    return time.perf_counter() - begin


@dataclass(frozen=True)
class _Timer:
    """Times calls by a clock, on a device."""

    now: Callable[[], float]
    device: torch.device

    def block(self, call: Callable[[], object], runs: int) -> float:
        """Seconds of a run: the fastest of a block of them."""
        group = GROUP.get(self.device.type, GROUP["cuda"])
        self.wait()
        found: list[float] = []
        done, together = 0, 1
        while done < runs:
            begin = self.now()
            for _ in range(together):
                call()
            self.wait()
            found.append((self.now() - begin) / together)
            done += together
            together = max(1, math.ceil(group / max(min(found), 1e-9)))
        return min(found)

    def shortest(self, call: Callable[[], object]) -> float:
        """The shortest of 3 runs; of 1 where it takes longer than a second."""
        found = self.block(call, 1)
        return max(1e-9, found if found > 1 else min(found, *(self.block(call, 1) for _ in range(2))))

    def wait(self) -> None:
        """Wait for the work of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
