"""Recovered fractions and the standard errors of their differences."""

import math
import random
from statistics import stdev

import pytest

from softprompt_kernels.compress.diagnose.evidence import AskedQuery, difference, gain, recovered


def asked(none: float, prompt: float) -> AskedQuery:
    return AskedQuery("q", "a", "given", 5, none, prompt)


def test_recovered_weighs_queries_by_their_kl() -> None:
    queries = [asked(1.0, 0.0), asked(3.0, 3.0)]
    assert recovered(queries, [0.0, 3.0]) == pytest.approx(0.25)
    assert math.isnan(recovered([asked(0.0, 0.0)], [0.0]))


def test_the_standard_error_of_a_gain_is_that_of_repeated_draws() -> None:
    draw = random.Random(0)

    def sample() -> tuple[float, float]:
        queries, before, after = [], [], []
        for _ in range(30):
            none = draw.uniform(0.5, 1.5)
            queries.append(asked(none, 0.0))
            before.append(0.5 * none)
            after.append(0.3 * none + draw.gauss(0, 0.1))
        found = gain(queries, before, after)
        return found.value, found.error

    values, errors = zip(*(sample() for _ in range(300)), strict=True)
    assert sum(values) / 300 == pytest.approx(0.2, abs=0.01)
    assert sum(errors) / 300 == pytest.approx(stdev(values), rel=0.15)


def test_the_difference_of_two_sets_adds_their_errors() -> None:
    one, other = [asked(1.0, 0.1), asked(1.0, 0.3)], [asked(2.0, 1.0), asked(2.0, 1.2)]
    found = difference(one, other)
    assert found.value == pytest.approx(0.8 - 0.45)
    assert found.error == pytest.approx(math.hypot(0.1, 0.05))


def test_one_query_has_no_error_and_none_no_gain() -> None:
    assert gain([asked(1.0, 0.0)], [0.5], [0.2]).error == 0
    assert not gain([], [], []).counts
