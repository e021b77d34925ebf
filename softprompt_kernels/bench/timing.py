"""Times entries in turns, each between two runs of the reference workload.

A round is: reference, entry, reference, entry, …, reference, and each round starts with another entry. The reference of
an entry is the mean of the one before and the one after it. A measurement is a block of runs that takes at least 5 ms,
and its figure is the median of these runs: where another process takes the CPU, it hits one or two of them. Runs of
less than 0.1 ms (on a GPU: 2 ms, since each measurement waits for the device) are timed some at a time. The reference's
blocks are about as long as the entries', up to 100 ms, so that a busy machine slows both alike.

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

from softprompt_kernels.bench.rounds import in_turns

BLOCK, LONGEST_REFERENCE = 0.005, 0.1  # seconds
GROUP = {"cpu": 1e-4, "cuda": 2e-3}  # seconds that are timed at least
SHORT, SHORT_RUNS = 0.02, 3  # runs below so many seconds are in blocks of at least so many
MIN_ROUNDS, MAX_ROUNDS = 10, 40


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
        seconds: about how long to measure, for each call. There are at least 10 rounds and at most 40.
        device: whose work to wait for.
        rounds: the number of rounds, whatever `seconds` says.

    Returns:
        one record a call.
    """
    once = [_shortest(call, device) for call in calls]
    entries = [Timed(max(SHORT_RUNS if seconds_ < SHORT else 1, math.ceil(BLOCK / seconds_))) for seconds_ in once]
    block = min(median(entry.runs * seconds_ for entry, seconds_ in zip(entries, once, strict=True)), LONGEST_REFERENCE)
    repeats = max(1, math.ceil(max(block, BLOCK) / _shortest(reference, device)))
    work = list(zip(calls, entries, strict=True))
    passed = _round(work, reference, repeats, device, keep=False)
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds * len(calls) / passed)))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            _round(in_turns(work, turn), reference, repeats, device, keep=True)
    finally:
        if collecting:
            gc.enable()
    return entries


def _round(
    work: Sequence[tuple[Callable[[], object], Timed]],
    reference: Callable[[], object],
    repeats: int,
    device: torch.device,
    keep: bool,
) -> float:
    """Time each call once; returns the seconds of the whole round."""
    begin = time.perf_counter()
    before = _block(reference, repeats, device)
    for call, timed in work:
        seconds = _block(call, timed.runs, device)
        after = _block(reference, repeats, device)
        if keep:
            timed.seconds.append(seconds)
            timed.reference_seconds.append((before + after) / 2)
        before = after
    return time.perf_counter() - begin


def _block(call: Callable[[], object], runs: int, device: torch.device) -> float:
    """Seconds of a run: the median over a block of them."""
    synchronize(device)
    found: list[float] = []
    done, together = 0, 1
    while done < runs:
        begin = time.perf_counter()
        for _ in range(together):
            call()
        synchronize(device)
        found.append((time.perf_counter() - begin) / together)
        done += together
        together = max(1, math.ceil(GROUP.get(device.type, GROUP["cuda"]) / min(found)))
    return median(found)


def _shortest(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of 3 runs; of 1 where it takes longer than a second."""
    found = _block(call, 1, device)
    return found if found > 1 else min(found, *(_block(call, 1, device) for _ in range(2)))


def synchronize(device: torch.device) -> None:
    """Wait for the work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
