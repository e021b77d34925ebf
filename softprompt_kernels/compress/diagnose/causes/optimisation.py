"""Optimisation: a better prompt of the same length is known, or the learning rate cannot find one.

Three signs, and each can stand alone:

- matching alone, without any training, recovers more with as many tokens; or the start of the training did;
- the loss of the training rose;
- the learning rate is far from the range in which a rate range test makes the loss fall. Adam moves a number by at most
  about the learning rate in a step. So a run moves it by at most the sum of its rates, its *path*. If that is shorter
  than the path on which the test made half of its fall, rate or steps are too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import variance

from softprompt_kernels.compress.diagnose.causes.objective import objective
from softprompt_kernels.compress.diagnose.causes.words import MATCHED_OPTIONS, part, rate
from softprompt_kernels.compress.diagnose.evidence import ERRORS, MEANINGFUL, Evidence, Gain, gain, recovered
from softprompt_kernels.compress.evaluate.diagnosis import Finding, RateTest

FALL = 0.05
"""A part of the starting loss. A test that lowers the loss by less has found no range."""

RISE = 0.1
"""A part of the fall so far. Where the loss of a test has risen by more, its range ends. At higher rates the loss may
fall again by chance, as each step replaces the prompt."""

ENDS = 0.25
"""The part of the steps at either end of a training whose mean loss is compared."""

FEWEST_STEPS = 4
"""At either end. The losses of fewer steps differ by their batches."""


@dataclass(frozen=True)
class RateRange:
    """The learning rates at which the loss of a test fell.

    Args:
        low, high: the rates at which a tenth of the fall was done, and at which the loss was least before it rose.
        suggested: the rate at which half of the fall was done, and the loss fell on.
        half_path: the sum of the rates up to there.
        fall: of the loss, as a part of the loss at the start.
    """

    low: float
    high: float
    suggested: float
    half_path: float
    fall: float


def rate_range(test: RateTest) -> RateRange | None:
    """What a rate range test says; None if the loss fell nowhere."""
    losses: list[float] = []
    for point in test.points:
        least_loss = min([test.start_loss, *losses])
        if point.loss - least_loss > RISE * (test.start_loss - least_loss) and least_loss < test.start_loss:
            break
        losses.append(point.loss)
    if not losses or test.start_loss <= 0:
        return None
    least = min(range(len(losses)), key=losses.__getitem__)
    fall = test.start_loss - losses[least]
    if fall < FALL * test.start_loss:
        return None
    rates = [point.rate for point in test.points]

    def first(share: float) -> int:
        return next(i for i, loss in enumerate(losses) if test.start_loss - loss >= share * fall)

    half = first(0.5)
    return RateRange(
        low=rates[first(0.1)],
        high=rates[least],
        suggested=rates[half],
        half_path=sum(rates[: half + 1]),
        fall=fall / test.start_loss,
    )


def optimisation(evidence: Evidence) -> Finding | None:
    """Whether a better prompt of this length is known, or the training could not find one."""
    better = _known_better(evidence)
    fault = fault_of_training(evidence)
    if better is None and fault is None:
        return None
    config = evidence.config
    rows = list(_rows(evidence))
    if better is not None:
        rows.insert(0, (f"recovered {better.name}, {config.tokens} tokens, held-out", part(better.recovered)))
    sentence, change, options = fault or _by_start(evidence)
    if fault is not None and better is not None and config.init != "matched":
        change += f" Or start from the matched prompt: {MATCHED_OPTIONS}."
    expected = (
        f"At least {part(evidence.recovered)} → {part(better.recovered)} held-out, which a prompt of {config.tokens} "
        f"tokens has {better.name}."
        if better is not None
        else ""
    )
    return Finding(
        cause="optimisation",
        sentence=sentence,
        evidence=tuple(rows),
        change=change,
        options=options,
        expected=expected,
        gain=None if better is None else better.gain.value,
    )


def unfinished_training(evidence: Evidence) -> Finding:
    """What is left when neither the length nor the queries limit a prompt: it can be trained, or for longer."""
    config = evidence.config
    steps = 2 * config.steps or 200
    return Finding(
        cause="optimisation",
        sentence="Neither the length of the prompt nor the queries explain what is missing: "
        + ("it was not trained." if not config.steps else f"{config.steps} steps of training leave it."),
        evidence=tuple(_rows(evidence)),
        change="Train it." if not config.steps else "Train it for longer.",
        options=f"--steps {steps}"
        + (" --matching-steps 300" if config.init == "matched" and not config.matching_steps else ""),
        expected="Not known before it is tried.",
    )


@dataclass(frozen=True)
class _Better:
    """A better prompt of the same length: how it is made, what it recovers on held-out queries, and the difference."""

    name: str
    recovered: float
    gain: Gain


def _known_better(evidence: Evidence) -> _Better | None:
    """The better of the matched prompt and of the start of the training, if one of them beats the prompt.

    A matched prompt must win on the training queries too. Otherwise the training did its work, and what it lacks on the
    held-out ones is a matter of data. An objective that ruins the distribution is found elsewhere.
    """
    if objective(evidence) is not None or evidence.config.kind == "embedding":
        return None
    now, found = [one.prompt for one in evidence.heldout], []
    matched = evidence.matched_at(evidence.config.tokens)
    if matched is not None:
        train = gain(evidence.train, [one.prompt for one in evidence.train], matched.train)
        if train.value > MEANINGFUL:
            found.append(("by matching alone", matched.heldout))
    if evidence.initial is not None:
        found.append(("before training", evidence.initial))
    better = [_Better(name, recovered(evidence.heldout, kl), gain(evidence.heldout, now, kl)) for name, kl in found]
    return max((one for one in better if one.gain.counts), key=lambda one: one.recovered, default=None)


def fault_of_training(evidence: Evidence) -> tuple[str, str, str] | None:
    """What is wrong with rate or steps: a sentence, the change and its options; None if nothing is seen."""
    config, test = evidence.config, evidence.rate_test
    if not evidence.learning_rates:
        return None
    found = None if test is None else rate_range(test)
    named = f"The learning rate {rate(config.learning_rate)}"
    if found is not None:
        within = f"the range in which the loss falls ({rate(found.low)} to {rate(found.high)})"
        options = f"--learning-rate {rate(found.suggested)}"
        if config.learning_rate > found.high:
            return f"{named} is above {within}.", "Take a smaller learning rate.", options
        if sum(evidence.learning_rates) < found.half_path:
            if config.learning_rate < found.low:
                return f"{named} is below {within}.", "Take a larger learning rate.", options
            steps = round(config.steps * 4 * found.half_path / sum(evidence.learning_rates))
            what = f"{config.steps} steps at the learning rate {rate(config.learning_rate)} are too few to move the "
            return what + "prompt far enough.", "Train for longer.", f"--steps {steps}"
    if rose(evidence.losses):
        first, last = ends(evidence.losses)
        smaller = rate(config.learning_rate / 10)
        what = f"The loss rose in training, from {first:.3g} to {last:.3g}: the learning rate is too large."
        return what, "Take a smaller learning rate.", f"--learning-rate {smaller}"
    return None


def _by_start(evidence: Evidence) -> tuple[str, str, str]:
    """The finding where nothing is wrong with the rate: another start is better, or none at all."""
    config = evidence.config
    if config.init != "matched":
        what = f"From init={config.init}, " + (
            f"{config.steps} steps do not reach what matching gives with as many tokens."
            if config.steps
            else "without training, the prompt is worse than a matched one."
        )
        return what, "Start from the matched prompt.", MATCHED_OPTIONS
    if config.steps:
        what = "The training has made the matched prompt worse."
        return what, "Take a smaller learning rate.", f"--learning-rate {rate(config.learning_rate / 10)}"
    return (
        "The refinement of the matching has made the prompt worse than the closed form.",
        "Match more rows, or leave out the refinement.",
        f"--matching-rows {2 * config.matching_rows}",
    )


def ends(losses: tuple[float, ...]) -> tuple[float, float]:
    """Mean loss of the first and of the last steps of a training: a part `ENDS` of them, at least one."""
    count = _count(losses)
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def rose(losses: tuple[float, ...]) -> bool:
    """Whether the loss rose by more than its batches explain."""
    count = _count(losses)
    if count < FEWEST_STEPS:
        return False
    first, last = ends(losses)
    error = math.sqrt((variance(losses[:count]) + variance(losses[-count:])) / count)
    return last - first > ERRORS * error


def _count(losses: tuple[float, ...]) -> int:
    return max(1, round(ENDS * len(losses)))


def _rows(evidence: Evidence) -> list[tuple[str, str]]:
    """What is known of the training."""
    config, rows = evidence.config, []
    rows.append(("recovered, held-out", part(evidence.recovered)))
    rows.append(("recovered, training queries", part(evidence.train_recovered)))
    if evidence.match_error:
        mean = sum(evidence.match_error) / len(evidence.match_error)
        worst = max(range(len(evidence.match_error)), key=evidence.match_error.__getitem__)
        rows.append(
            ("matching error, mean and worst layer", f"{mean:.3f}, {evidence.match_error[worst]:.3f} (layer {worst})")
        )
    if evidence.losses:
        first, last = ends(evidence.losses)
        rows.append((f"training loss, first and last quarter of {config.steps} steps", f"{first:.3g}, {last:.3g}"))
    if evidence.rate_test is not None:
        found = rate_range(evidence.rate_test)
        value = (
            "falls nowhere" if found is None else f"falls by {found.fall:.0%}, {rate(found.low)} to {rate(found.high)}"
        )
        rows.append(("loss in the rate range test", value))
        rows.append(("learning rate of the run", rate(config.learning_rate) if config.steps else "not trained"))
    return rows
