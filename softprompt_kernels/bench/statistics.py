"""How much slower is one run than another: an interval for the ratio of their times, without assuming a distribution.

Each run gives one number a round: the time of an entry over that of the reference workload beside it. Times on a shared
machine are skewed and have outliers, so means and normal distributions do not describe them. The interval is that of
Hodges and Lehmann (1963), from the rank test of Mann and Whitney (1947):

    all n·m ratios new_j / base_i, sorted:  r_(1) ≤ r_(2) ≤ … ≤ r_(n·m)
    estimate:     their median
    lower limit:  r_(k), with the largest k for which P(U < k) ≤ α
    upper limit:  r_(n·m + 1 − k)

U is the statistic of the rank test; its distribution for equal runs is counted exactly. With α = 0.05 / (number of
rows) (Bonferroni), the chance that any lower limit of a whole table is above the true ratio is at most 5 %.

The test takes rounds as independent. A load that lasts for many rounds breaks this, and reaches the ratio where it
slows the entry and the reference differently. So the limits are moved apart by the `drift` of both runs, which is seen
between the two halves of a run.
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
    """The interval of new / base, each limit with the given error rate. (0, middle, inf) where rounds are too few."""
    ratios = numpy.sort(numpy.divide.outer(numpy.asarray(new, float), numpy.asarray(base, float)).ravel())
    count = _rank(len(base), len(new), error_rate)
    middle = float(numpy.median(ratios))
    if count == 0:
        return Interval(0.0, middle, math.inf)
    apart = math.hypot(drift(base), drift(new))
    low, high = float(ratios[count - 1]), float(ratios[len(ratios) - count])
    return Interval(min(low, middle / (1 + apart)), middle, max(high, middle * (1 + apart)))


def drift(values: Sequence[float]) -> float:
    """How far the medians of the two halves of a run are apart, relative to the smaller one."""
    half = len(values) // 2
    if half == 0:
        return 0.0
    first, second = median(values[:half]), median(values[half:])
    return abs(first - second) / min(first, second)


def _rank(rounds: int, others: int, error_rate: float) -> int:
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
