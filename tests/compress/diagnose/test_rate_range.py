"""What a rate range test says, and the test itself."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from softprompt_kernels.compress import CompressConfig, diagnose_run
from softprompt_kernels.compress.diagnose.causes.optimisation import FALL, RISE, ends, rate_range, rose
from softprompt_kernels.compress.diagnose.rate_range_test import FAR_ABOVE, STEPS, schedule
from softprompt_kernels.compress.evaluate.diagnosis import RatePoint, RateTest


def test_of(*losses: float, start: float = 1.0) -> RateTest:
    points = tuple(RatePoint(rate=10.0**index, loss=loss) for index, loss in enumerate(losses))
    return RateTest(start_loss=start, points=points, run_rate=1.0, suggested=None, seconds=0.0)


test_of.__test__ = False  # type: ignore[attr-defined]


def test_the_range_goes_from_a_tenth_of_the_fall_to_the_least_loss() -> None:
    found = rate_range(test_of(0.99, 0.9, 0.5, 0.2, 0.8))
    assert found is not None
    assert (found.low, found.suggested, found.high) == (10, 100, 1000)
    assert found.fall == pytest.approx(0.8) and found.half_path == 111


@pytest.mark.parametrize(("loss", "found"), [(1 - FALL - 1e-3, True), (1 - FALL + 1e-3, False)])
def test_a_loss_that_falls_nowhere_has_no_range(loss: float, found: bool) -> None:
    assert (rate_range(test_of(1.0, loss, 1.2)) is not None) == found
    assert rate_range(test_of()) is None and rate_range(test_of(1.0, start=0.0)) is None


@pytest.mark.parametrize(("rise", "high"), [(RISE + 0.01, 1), (RISE - 0.01, 100)])
def test_the_range_ends_where_the_loss_rises(rise: float, high: float) -> None:
    found = rate_range(test_of(0.5, 0.5 + rise * 0.5, 0.1))
    assert found is not None and found.high == high


def test_a_rise_before_any_fall_does_not_end_the_range() -> None:
    found = rate_range(test_of(1.01, 0.5))
    assert found is not None and found.high == 10


def test_the_ends_of_a_training_are_a_quarter_of_its_steps() -> None:
    assert ends((4.0, 2.0, 9.0, 9.0, 9.0, 9.0, 1.0, 3.0)) == (3.0, 2.0)
    assert ends((4.0,)) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("rise", "steps", "found"),
    [(0.9, 16, True), (0.7, 16, False), (0.9, 13, False), (0.7, 64, True), (-0.9, 16, False)],
)
def test_a_loss_rose_if_its_batches_do_not_explain_it(rise: float, steps: int, found: bool) -> None:
    """Losses of both ends differ by ±0.5 within: a standard error of 0.41 for four steps each, of 0.18 for 16."""
    losses = [(0.5 if step % 2 else -0.5) + (rise if step >= steps / 2 else 0.0) for step in range(steps)]
    assert rose(tuple(losses)) == found


@pytest.mark.parametrize("rate", [1e-6, 5e-3, 3.0])
def test_the_rates_of_a_test_rise_geometrically_around_that_of_the_run(
    make_config: Callable[..., CompressConfig], rate: float
) -> None:
    rising = schedule(make_config(learning_rate=rate))
    rates = [rising.at(step) for step in range(STEPS)]
    assert rates[0] <= min(1e-4, rate / 10) * 1.001 and rates[-1] >= max(1, rate * 10) * 0.999
    factors = [after / before for before, after in pairwise(rates)]
    assert max(factors) == pytest.approx(min(factors))


def test_a_test_ends_when_the_loss_is_far_above_its_start(make_run: Callable[..., Path]) -> None:
    """A run that starts from a matched prompt is near to the least loss already."""
    found = diagnose_run(make_run(steps=2, learning_rate=5.0), full=True).rate_test
    assert found is not None
    losses = [point.loss for point in found.points]
    assert 1 < len(losses) < STEPS
    assert losses[-1] > FAR_ABOVE * found.start_loss >= max(losses[:-1])
