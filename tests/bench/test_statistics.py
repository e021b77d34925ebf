"""The interval for the ratio of two runs' times."""

import math
from itertools import combinations

import numpy
import pytest

from softprompt_kernels.bench.compare import FASTER, SAME, SLOWER, UNCLEAR, verdict_of
from softprompt_kernels.bench.statistics import Interval, noise, rank_of_limit, ratio_interval

N = 6


def noisy(generator: numpy.random.Generator, count: int, scale: float = 1.0) -> list[float]:
    """Times with a spread of 3 %, and one in ten that another process made half as long again."""
    times = scale * (1 + 0.03 * numpy.abs(generator.standard_normal(count)))
    return list(times * numpy.where(generator.random(count) < 0.1, 1.5, 1.0))


@pytest.mark.parametrize(("rounds", "others"), [(3, 4), (4, 3), (6, 6), (1, 8)])
def test_the_distribution_of_the_rank_test_is_counted(rounds: int, others: int) -> None:
    places = list(combinations(range(rounds + others), rounds))
    ranks = [sum(chosen) - rounds * (rounds - 1) // 2 for chosen in places]
    for error_rate in (0.001, 0.05, 0.3, 0.5, 0.9):
        fitting = [k for k in range(rounds * others + 1) if sum(r < k for r in ranks) / len(ranks) <= error_rate]
        assert rank_of_limit(rounds, others, error_rate) == max(fitting)


def test_the_limits_have_the_rank_that_counting_gives() -> None:
    places = list(combinations(range(2 * N), N))
    ranks = [sum(chosen) - N * (N - 1) // 2 for chosen in places]
    base, new = [1.0 + 0.1 * i for i in range(N)], [2.05 + 0.1 * i for i in range(N)]
    slow = [9.0] * (N // 2)
    ratios = sorted(one / other for one in new for other in base)
    for error_rate in (0.002, 0.01, 0.05):
        count = max(k for k in range(N * N) if sum(rank < k for rank in ranks) / len(ranks) <= error_rate)
        assert count > 0
        # Two laps, each with a slow half, which is dropped. The laps are mixed, so that they do not differ.
        laps = [[*values[::2], *slow, *values[1::2], *slow] for values in (base, new)]
        apart = 1 + math.hypot(*map(noise, laps))
        middle = float(numpy.median(ratios))
        found = ratio_interval(*laps, error_rate)
        assert found.middle == pytest.approx(middle)
        assert found.low == pytest.approx(min(ratios[count - 1], middle / apart))
        assert found.high == pytest.approx(max(ratios[-count], middle * apart))
    assert ratios[count - 1] > middle / apart  # of the last error rate: the test above sees both limits
    assert ratio_interval(*laps, 0.002).low == pytest.approx(ratios[0], rel=0.2)


def test_limits_hold_as_often_as_they_say() -> None:
    generator = numpy.random.default_rng(0)
    trials, error_rate = 400, 0.05
    found = [ratio_interval(noisy(generator, 30), noisy(generator, 30, 1.3), error_rate) for _ in range(trials)]
    assert sum(one.low > 1.3 for one in found) <= 1.5 * error_rate * trials
    assert sum(one.high < 1.3 for one in found) <= 1.5 * error_rate * trials


def test_a_fifth_is_told_from_noise_and_noise_is_not_flagged() -> None:
    generator = numpy.random.default_rng(1)
    rate = 0.05 / 50
    slow = [verdict_of(ratio_interval(noisy(generator, 24), noisy(generator, 24, 1.2), rate), 0.1) for _ in range(100)]
    same = [verdict_of(ratio_interval(noisy(generator, 24), noisy(generator, 24), rate), 0.1) for _ in range(100)]
    assert slow.count(SLOWER) >= 90
    assert SLOWER not in same
    assert FASTER not in same


@pytest.mark.parametrize("kind", ["symmetric", "exponential", "heavy"])
def test_limits_hold_for_other_distributions_and_more_rounds_say_more(kind: str) -> None:
    generator = numpy.random.default_rng(2)

    def times(count: int, scale: float = 1.0) -> list[float]:
        spread = {
            "symmetric": numpy.exp(0.05 * generator.standard_normal(count)),
            "exponential": 1 + generator.exponential(0.1, count),
            "heavy": 1 + 0.1 * generator.pareto(1.5, count),
        }
        return list(scale * spread[kind])

    trials = 200
    for rounds, least in ((16, 0.6), (40, 0.8)):
        same = [ratio_interval(times(rounds), times(rounds), 0.05) for _ in range(trials)]
        assert sum(one.low > 1 for one in same) <= 0.05 * trials
        assert sum(one.high < 1 for one in same) <= 0.05 * trials
        slow = [verdict_of(ratio_interval(times(rounds), times(rounds, 1.2), 0.05 / 14), 0.1) for _ in range(trials)]
        assert slow.count(SLOWER) >= least * trials


def test_too_few_rounds_say_nothing() -> None:
    found = ratio_interval([1.0, 1.0, 1.0], [9.0, 9.0, 9.0], 0.001)
    assert found == Interval(0.0, 9.0, math.inf)
    assert verdict_of(found, 0.1) == UNCLEAR


def test_a_noisy_run_widens_the_interval() -> None:
    steady, drifting, uneven = [1.0] * 20, [1.0] * 10 + [1.3] * 10, [1.0, 1.2, 1.2, 1.2] * 5
    assert noise(steady) == 0
    assert noise(drifting) == pytest.approx(0.3)
    assert noise(uneven) == pytest.approx(0.2)
    assert verdict_of(ratio_interval(steady, [1.25] * 20, 0.01), 0.1) == SLOWER
    assert verdict_of(ratio_interval(drifting, [1.45] * 20, 0.01), 0.1) == UNCLEAR
    assert verdict_of(ratio_interval(uneven, [1.3] * 20, 0.01), 0.1) == UNCLEAR


def test_rounds_that_another_process_slowed_are_dropped() -> None:
    clean = [1.0, 1.01, 1.02, 1.0] * 5
    hit = [1.0, 5.0, 1.01, 7.0, 1.02] * 4
    assert verdict_of(ratio_interval(clean, hit, 0.01), 0.1) == SAME


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.11, 1.2, 1.3), SLOWER),
        ((1.05, 1.2, 1.3), UNCLEAR),
        ((0.95, 1.0, 1.05), SAME),
        ((0.7, 0.8, 0.9), FASTER),
        ((0.7, 0.8, 0.92), UNCLEAR),
    ],
)
def test_verdicts(interval: tuple[float, float, float], verdict: str) -> None:
    assert verdict_of(Interval(*interval), 0.1) == verdict
