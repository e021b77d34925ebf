"""How much slower is one run than another: an interval for the ratio of their times, without assuming a distribution.

Each run gives one number a round: the time of an entry over that of the reference workload beside it. A shared machine
only adds to a time, so the slower half of each lap is dropped. What is left is skewed still, so means and normal
distributions do not describe it. The interval is that of Hodges and Lehmann (1963), from the rank test of Mann and
Whitney (1947), on the n and m numbers that are left:

    all n·m ratios new_j / base_i, sorted:  r_(1) ≤ r_(2) ≤ … ≤ r_(n·m)
    estimate:     their median
    lower limit:  r_(k), with the largest k for which P(U < k) ≤ α
    upper limit:  r_(n·m + 1 − k)

U is the statistic of the rank test; its distribution for equal runs is counted exactly. α is 0.05 / (number of rows)
(Bonferroni), so that 5 % is for a whole table.

The rank test alone would promise too much. What is left after dropping is more alike than the rounds were, which makes
its limits wrong about twice as often as α says. And it takes rounds as independent. A load that lasts for many rounds
breaks this, and reaches the ratio where it slows the entry and the reference differently. So the limits are at least as
far from the estimate as the `noise` of both runs: the difference between the laps, and how far the median is above the
fastest tenth. With it, limits in simulated runs are wrong less often than α says (tests/bench/test_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import numpy

ERROR_RATE = 0.05  # chance of a false limit in a whole table


class Interval(NamedTuple):
    """The ratio of two runs' times: 1.2 is a fifth slower."""

    low: float
    middle: float
    high: float


def ratio_interval(base: Sequence[float], new: Sequence[float], error_rate: float) -> Interval:
    """The interval of new / base, each limit with the given error rate. (0, middle, inf) where rounds are too few.

    Args:
        base, new: a number a round, in the order of the rounds. The two halves are the laps.
        error_rate: of each limit.
    """
    one, other = fast_half(base), fast_half(new)
    ratios = numpy.sort(numpy.divide.outer(numpy.asarray(other), numpy.asarray(one)).ravel())
    count = rank_of_limit(len(one), len(other), error_rate)
    middle = float(numpy.median(ratios))
    if count == 0:
        return Interval(0.0, middle, math.inf)
    apart = 1 + math.hypot(noise(base), noise(new))
    low, high = float(ratios[count - 1]), float(ratios[len(ratios) - count])
    return Interval(min(low, middle / apart), middle, max(high, middle * apart))


def fast_half(values: Sequence[float]) -> list[float]:
    """The faster half of each lap."""
    return [value for lap in _laps(values) for value in sorted(lap)[: (len(lap) + 1) // 2]]


def noise(values: Sequence[float]) -> float:
    """How far the laps are apart, or the median is above the fastest tenth: the larger one, in the faster halves.

    Not above the fastest round: with more rounds that one would get faster, and the interval wider.
    """
    kept = fast_half(values)
    middles = [median(sorted(lap)[: (len(lap) + 1) // 2]) for lap in _laps(values)]
    return max(max(middles) / min(middles), median(kept) / float(numpy.quantile(kept, 0.1))) - 1


def _laps(values: Sequence[float]) -> list[Sequence[float]]:
    half = len(values) // 2
    return [lap for lap in (values[:half], values[half:]) if lap]


def rank_of_limit(rounds: int, others: int, error_rate: float) -> int:
    """The largest k with P(U < k) ≤ error_rate; 0 if there is none."""
    counts = numpy.array([1.0])
    # The generating function of U, ∏ (1 − q^(others + i)) / (1 − q^i), a factor at a time.
    for i in range(1, rounds + 1):
        counts = numpy.concatenate([counts, numpy.zeros(others + i)])
        counts[others + i :] -= counts[: -(others + i)].copy()
        for start in range(i):
            counts[start::i] = numpy.cumsum(counts[start::i])
        counts = counts[: i * others + 1]
    probabilities = numpy.cumsum(counts) / math.comb(rounds + others, rounds)
    return int(numpy.searchsorted(probabilities, error_rate, side="right"))
