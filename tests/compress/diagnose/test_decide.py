"""The decisions, each threshold from both sides, on figures without a run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from softprompt_kernels.compress.diagnose.causes.capacity import capacity
from softprompt_kernels.compress.diagnose.causes.data import LARGE_SHARE, data, families
from softprompt_kernels.compress.diagnose.causes.objective import AGREES, RUINED, objective
from softprompt_kernels.compress.diagnose.causes.optimisation import optimisation
from softprompt_kernels.compress.diagnose.causes.template import FEWEST, HARDLY_EVER, LONG, RUNS_ON, broken_template
from softprompt_kernels.compress.diagnose.causes.unneeded import NEEDLESS_KL, nothing_to_compress
from softprompt_kernels.compress.diagnose.decide import GOOD, MAIN, findings
from softprompt_kernels.compress.diagnose.evidence import ERRORS, MEANINGFUL, AskedQuery, Evidence, Turns
from softprompt_kernels.compress.evaluate.diagnosis import RatePoint, RateTest

Make = Callable[..., Evidence]
TRAINED = {"steps": 100, "init": "strided", "learning_rate": 0.01}


def causes(evidence: Evidence) -> list[str]:
    return [one.cause for one in findings(evidence)]


# Capacity


@pytest.mark.parametrize(("rise", "found"), [(MEANINGFUL + 1e-3, True), (MEANINGFUL - 1e-3, False)])
def test_a_curve_that_rises_is_a_matter_of_capacity(make_evidence: Make, rise: float, found: bool) -> None:
    evidence = make_evidence(matched={8: (0.5, 0.5), 16: (0.5 + rise, 0.9)})
    assert (capacity(evidence) is not None) == found


@pytest.mark.parametrize(("errors", "found"), [(ERRORS + 0.1, True), (ERRORS - 0.1, False)])
def test_a_rise_that_may_be_chance_does_not_count(make_evidence: Make, errors: float, found: bool) -> None:
    spread = 0.3 / errors * 3  # of ten queries; the standard error is spread / 3
    evidence = make_evidence(matched={8: (0.5, 0.5), 16: (0.8, 0.8)})
    longer = replace(evidence.matched[1], heldout=tuple(0.2 + (spread if i % 2 else -spread) for i in range(10)))
    assert (capacity(replace(evidence, matched=(evidence.matched[0], longer))) is not None) == found


@pytest.mark.parametrize(("rise", "found"), [(MEANINGFUL + 1e-3, True), (MEANINGFUL - 1e-3, False)])
def test_a_curve_that_is_full_on_training_queries_is_not(make_evidence: Make, rise: float, found: bool) -> None:
    evidence = make_evidence(matched={8: (0.5, 0.9), 16: (0.8, 0.9 + rise)})
    assert (capacity(evidence) is not None) == found


def test_the_gain_of_a_trained_prompt_is_the_part_of_what_it_still_lacks(make_evidence: Make) -> None:
    evidence = make_evidence(0.8, matched={8: (0.6, 0.6), 16: (0.9, 0.9)})
    found = capacity(evidence)
    assert found is not None and found.gain == pytest.approx(0.75 * 0.2)
    assert "0.60 → 0.90 held-out" in found.expected and "about 0.95" in found.expected
    worse = capacity(make_evidence(0.1, matched={8: (0.6, 0.6), 16: (0.9, 0.9)}))
    assert worse is not None and worse.gain == pytest.approx(0.3), "what training spoilt is no matter of capacity"


@pytest.mark.parametrize(("matched", "found"), [(0.5 + MEANINGFUL + 1e-3, True), (0.5 + MEANINGFUL - 1e-3, False)])
def test_embeddings_hold_less_than_keys_and_values(make_evidence: Make, matched: float, found: bool) -> None:
    evidence = make_evidence(config={"kind": "embedding"}, matched={8: (matched, matched), 16: (0.9, 0.9)})
    cause = capacity(evidence)
    assert (cause is not None) == found
    assert cause is None or cause.options == "--kind kv --init matched --learning-rate 0.005"
    assert optimisation(evidence) is None
    rose = replace(evidence, losses=(*(1.0,) * 9, *(2.0,) * 9), learning_rates=(0.1,) * 18)
    assert causes(rose)[0] == "optimisation" and capacity(rose) is None, "a wrong rate explains it too"


# Data


@pytest.mark.parametrize(("train", "found"), [(0.5 + MEANINGFUL + 1e-3, True), (0.5 + MEANINGFUL - 1e-3, False)])
def test_held_out_queries_that_recover_less_are_a_matter_of_data(
    make_evidence: Make, train: float, found: bool
) -> None:
    assert (data(make_evidence(0.5, train)) is not None) == found


def test_a_difference_that_may_be_chance_is_no_finding(make_evidence: Make) -> None:
    assert data(make_evidence(0.5, 0.7, spread=0.1)) is not None
    assert data(make_evidence(0.5, 0.7, spread=0.3)) is None


@pytest.mark.parametrize(("share", "options"), [(LARGE_SHARE + 0.01, ""), (LARGE_SHARE - 0.01, "--selfstudy 512")])
def test_the_families_with_much_of_the_loss_decide_what_to_add(make_evidence: Make, share: float, options: str) -> None:
    evidence = make_evidence(0.5, 0.9, train_families={"phrase": 9}, more_selfstudy=256 if share < LARGE_SHARE else 0)
    phrases = [replace(one, family="phrase", prompt=1 - share) for one in evidence.heldout]
    mine = [replace(one, family="mine", prompt=share) for one in evidence.heldout]
    evidence = replace(evidence, heldout=(*phrases, *mine))
    assert [one.name for one in families(evidence)] == ["phrase", "mine"]
    found = data(evidence)
    assert found is not None and found.options == options
    assert ("file of --queries" in found.change) == (not options)
    assert "None of them is of the kind 'mine'" in found.sentence


# Objective


@pytest.mark.parametrize(
    ("agreeing", "share", "found"),
    [
        (AGREES + 0.05, RUINED + 0.01, True),
        (AGREES - 0.05, RUINED + 0.01, False),
        (AGREES + 0.05, RUINED - 0.01, False),
    ],
)
def test_a_ruined_distribution_is_a_matter_of_the_objective(
    make_evidence: Make, agreeing: float, share: float, found: bool
) -> None:
    config = TRAINED | {"objective": "nll"}
    evidence = make_evidence(config=config, matched={8: (0.9, 0.9)}, agreeing_share=share)
    evidence = replace(
        evidence, train=tuple(replace(one, tokens=20, agreeing=round(20 * agreeing)) for one in evidence.train)
    )
    assert (objective(evidence) is not None) == found
    assert causes(evidence)[0] == ("objective" if found else "optimisation")


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, None),
        ({"objective": "nll"}, "--objective kl"),
        ({"objective": "reverse_kl", "loss_temperature": 2}, "--objective kl --loss-temperature 1"),
        ({"objective": "jsd", "beta": 0.1}, "--objective kl --beta 0.5"),
        ({"nll_weight": 0.5}, "--nll-weight 0"),
    ],
)
def test_another_objective_than_the_plain_kl_is_to_blame(
    make_evidence: Make, config: dict[str, Any], options: str | None
) -> None:
    evidence = make_evidence(config=TRAINED | config, agreeing=8, agreeing_share=0.9)
    found = objective(evidence)
    assert (None if found is None else found.options) == options


@pytest.mark.parametrize(("steps", "matched", "found"), [(60, 0.6, True), (60, 0.5, False), (0, 0.6, False)])
def test_a_prompt_that_is_too_short_or_not_trained_is_no_matter_of_the_objective(
    make_evidence: Make, steps: int, matched: float, found: bool
) -> None:
    evidence = make_evidence(
        config=TRAINED | {"objective": "jsd", "steps": steps},
        matched={8: (matched, matched), 16: (0.9, 0.9)},
        agreeing=8,
        agreeing_share=0.9,
    )
    assert (objective(evidence) is not None) == found


# Nothing to compress, and a broken template


@pytest.mark.parametrize(("kl", "found"), [(NEEDLESS_KL * 0.99, True), (NEEDLESS_KL * 1.01, False)])
@pytest.mark.parametrize("name", ["heldout", "train"])
def test_queries_that_do_not_need_the_text(make_evidence: Make, name: str, kl: float, found: bool) -> None:
    evidence = replace(make_evidence(), **{name: (AskedQuery("q", "a", "given", 10, 10 * kl),)})
    assert (nothing_to_compress(evidence) is not None) == found


@pytest.mark.parametrize(
    ("turns", "new_tokens", "found"),
    [
        ({"running_on": round(100 * RUNS_ON)}, 6, True),
        ({"running_on": round(100 * RUNS_ON) - 1}, 6, False),
        ({"running_on": FEWEST, "answers": FEWEST}, 6, True),
        ({"running_on": FEWEST - 1, "answers": FEWEST - 1}, 6, False),
        ({"end_rendered": False, "ended": round(100 * HARDLY_EVER)}, LONG, True),
        ({"end_rendered": False, "ended": round(100 * HARDLY_EVER) + 1}, LONG, False),
        ({"end_rendered": False, "ended": 0}, LONG - 1, False),
        ({"end_rendered": True, "ended": 0, "end_probability": 1.01 / 512}, LONG, False),
        ({"end_rendered": True, "ended": 0, "end_probability": 0.99 / 512}, LONG, True),
        ({"end_rendered": True, "ended": 0, "end_probability": None}, LONG, False),
    ],
)
def test_a_broken_template(make_evidence: Make, turns: dict[str, Any], new_tokens: int, found: bool) -> None:
    healthy = Turns(100, 50, 0, "", True, 0.02, 512)
    evidence = make_evidence(config={"new_tokens": new_tokens}, turns=replace(healthy, **turns))
    assert (broken_template(evidence) is not None) == found
    assert (causes(evidence) == ["broken template"]) == found


# Optimisation


@pytest.mark.parametrize(("better", "found"), [(MEANINGFUL + 1e-3, True), (MEANINGFUL - 1e-3, False)])
def test_a_better_prompt_of_the_same_length_is_known(make_evidence: Make, better: float, found: bool) -> None:
    evidence = make_evidence(config=TRAINED, matched={8: (0.9, 0.5 + better)})
    assert (optimisation(evidence) is not None) == found, "on the training queries too"
    evidence = make_evidence(config=TRAINED, matched={8: (0.5 + better, 0.9)})
    assert (optimisation(evidence) is not None) == found
    evidence = make_evidence(config=TRAINED | {"init": "matched"}, initial=(0.5 - better,) * 10)
    cause = optimisation(evidence)
    assert (cause is not None) == found
    assert cause is None or cause.options == "--learning-rate 0.001", "training has spoilt the start"


def rates(*losses: float, first: float = 1e-3) -> RateTest:
    points = tuple(RatePoint(rate=first * 10**i, loss=loss) for i, loss in enumerate(losses))
    return RateTest(start_loss=1.0, points=points, run_rate=0.0, suggested=None, seconds=0.0)


@pytest.mark.parametrize(
    ("rate", "steps", "what", "options"),
    [
        # The loss falls from .001 to .1: half of it at .01, on a path of .011.
        (0.2, 100, "is above the range in which the loss falls (0.001 to 0.1)", "--learning-rate 0.01"),
        (0.1, 100, None, ""),
        (0.0005, 21, "is below the range", "--learning-rate 0.01"),
        (0.0005, 23, None, ""),
        (0.002, 5, "5 steps at the learning rate 0.002 are too few", "--steps 22"),
        (0.002, 6, None, ""),
    ],
)
def test_the_rate_of_a_run_beside_the_range_of_the_test(
    make_evidence: Make, rate: float, steps: int, what: str | None, options: str
) -> None:
    config = TRAINED | {"learning_rate": rate, "steps": steps, "warmup_steps": 0}
    trained = {"losses": (1.0,) * steps, "learning_rates": (rate,) * steps}
    found = optimisation(make_evidence(config=config, rate_test=rates(0.8, 0.4, 0.1, 0.9), **trained))
    assert (found is None) == (what is None)
    assert found is None or (what in found.sentence and found.options == options)


@pytest.mark.parametrize(("last", "found"), [(1.01, True), (0.99, False)])
def test_a_loss_that_rose_is_a_matter_of_the_rate(make_evidence: Make, last: float, found: bool) -> None:
    losses = (*(1.0,) * 50, *(last,) * 50)
    cause = optimisation(make_evidence(config=TRAINED, losses=losses, learning_rates=(0.01,) * 100))
    assert (cause is not None) == found
    assert cause is None or cause.options == "--learning-rate 0.001"


# The order


@pytest.mark.parametrize(("recovered", "found"), [(GOOD, ["nothing wrong"]), (GOOD - 1e-3, ["data"])])
def test_a_good_prompt_has_nothing_wrong(make_evidence: Make, recovered: float, found: list[str]) -> None:
    assert causes(make_evidence(recovered, 0.99)) == found


def test_the_cause_that_explains_most_comes_first(make_evidence: Make) -> None:
    matched = {8: (0.5, 0.5), 16: (0.7, 0.7)}
    assert causes(make_evidence(0.5, 0.8, matched=matched)) == ["data", "capacity"]
    assert causes(make_evidence(0.5, 0.6, matched=matched)) == ["capacity", "data"]


@pytest.mark.parametrize(("part", "first"), [(MAIN + 0.01, "data"), (MAIN - 0.01, "optimisation")])
def test_a_cause_that_explains_little_comes_behind_too_little_training(
    make_evidence: Make, part: float, first: str
) -> None:
    found = causes(make_evidence(0.5, 0.5 + 0.5 * part))
    assert found[0] == first and found[-1] == "data"


@pytest.mark.parametrize(("train", "first"), [(GOOD, "data"), (GOOD - 1e-3, "optimisation")])
def test_without_a_clear_cause_the_training_queries_decide(make_evidence: Make, train: float, first: str) -> None:
    found = findings(make_evidence(0.6, train, spread=0.4))
    assert [one.cause for one in found] == [first]
    assert found[0].gain is None
    assert first == "optimisation" or "may be chance" in found[0].evidence[0][1]


@pytest.mark.parametrize(
    ("config", "options"), [({}, "--steps 200"), (TRAINED, "--steps 200"), ({"steps": 150}, "--steps 300")]
)
def test_too_little_training(make_evidence: Make, config: dict[str, Any], options: str) -> None:
    found = findings(make_evidence(config=config))
    assert [one.options for one in found] == [options]
