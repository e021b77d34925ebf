"""What a diagnosis looks at: figures of a run, without the model and the files that they come from.

    recovered = 1 − Σ KL(prompt) / Σ KL(no context)                    sums over the tokens of all queries

A difference of two prompts on the same queries is `gain`. Queries are few, and a difference may be chance, so it comes
with the standard error of a ratio of sums over queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.evaluate.diagnosis import RateTest

MEANINGFUL = 0.02
"""A smaller part of the KL without context is not worth a change of the settings."""

ERRORS = 2.0
"""A difference of fewer standard errors may be chance (p > .05 for a normal distribution)."""


@dataclass(frozen=True)
class AskedQuery:
    """One evaluated query. The sums are over the tokens of its answer, in nats.

    Args:
        query, answer: its text, and that of the answer.
        family: as in `evaluate.details.ExampleDetails`.
        tokens: of the answer.
        none: KL of the model without context.
        prompt: KL of the model with the prompt; 0 for a run that was refused.
        agreeing: how many of the tokens are also the most likely ones with the prompt.
        agreeing_prompt: the part of `prompt` at those tokens.
    """

    query: str
    answer: str
    family: str
    tokens: int
    none: float
    prompt: float = 0.0
    agreeing: int = 0
    agreeing_prompt: float = 0.0


@dataclass(frozen=True)
class Matched:
    """A prompt by matching alone.

    Args:
        tokens: its length.
        heldout, train: KL of each query of `Evidence.heldout` and `Evidence.train`, summed over its answer, in nats.
        seconds: that it took.
    """

    tokens: int
    heldout: tuple[float, ...]
    train: tuple[float, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Turns:
    """How the answers end that the teacher wrote.

    Args:
        answers, ended: how many there are, and how many end with a token that ends an answer.
        running_on: how many go on with the next turn of the chat.
        example: one of the latter; "" if there is none.
        end_rendered: whether the chat template writes a token at the end of an answer; True without a template.
        end_probability: mean probability of the tokens that end an answer; None where it is not known.
        window: the longest sequence of the model, in tokens.
    """

    answers: int
    ended: int
    running_on: int
    example: str
    end_rendered: bool
    end_probability: float | None
    window: int


@dataclass(frozen=True)
class Evidence:
    """What is known of a run.

    Args:
        config: of the run.
        context_tokens: C.
        heldout, train: the held-out queries, and the sample of the training queries that was evaluated.
        turns: how the teacher's answers end.
        refused: the run was refused, because the context does not matter: there is no prompt.
        entropy_gap: mean entropy with the prompt minus that of the teacher on held-out answers, nats.
        initial: KL of each held-out query with the prompt before training; None where that is a baseline or the prompt.
        losses, learning_rates: of each step of training.
        match_error: mean over the heads of each layer of `Details.match_error`; None where it is not known.
        matched: prompts by matching alone, in order of length; empty where it was not tried.
        rate_test: None where it was not tried.
        train_families: the number of training queries by family.
        more_selfstudy: how many queries self-study could make beyond those that it made, up to as many again.
    """

    config: CompressConfig
    context_tokens: int
    heldout: tuple[AskedQuery, ...]
    train: tuple[AskedQuery, ...]
    turns: Turns
    refused: bool = False
    entropy_gap: float = 0.0
    initial: tuple[float, ...] | None = None
    losses: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    match_error: tuple[float, ...] | None = None
    matched: tuple[Matched, ...] = ()
    rate_test: RateTest | None = None
    train_families: Mapping[str, int] = field(default_factory=dict)
    more_selfstudy: int = 0

    @property
    def recovered(self) -> float:
        """Of the prompt, on held-out queries."""
        return recovered(self.heldout, [one.prompt for one in self.heldout])

    @property
    def train_recovered(self) -> float:
        """Of the prompt, on training queries."""
        return recovered(self.train, [one.prompt for one in self.train])

    def matched_at(self, tokens: int) -> Matched | None:
        """The matched prompt of this length, if it was tried."""
        return next((one for one in self.matched if one.tokens == tokens), None)

    @property
    def longer(self) -> Matched | None:
        """The matched prompt of the next length beyond the run's, if one was tried."""
        return next((one for one in self.matched if one.tokens > self.config.tokens), None)


@dataclass(frozen=True)
class Gain:
    """A difference of two recovered fractions, with its standard error."""

    value: float
    error: float

    @property
    def counts(self) -> bool:
        """Whether it is worth a change, and no chance."""
        return self.value > MEANINGFUL and self.value > ERRORS * self.error


def recovered(queries: Sequence[AskedQuery], kl: Sequence[float]) -> float:
    """1 − Σ kl / Σ KL without context; `kl` has one sum for each query, in nats."""
    none = sum(one.none for one in queries)
    return 1 - sum(kl) / none if none else math.nan


def gain(queries: Sequence[AskedQuery], before: Sequence[float], after: Sequence[float]) -> Gain:
    """What one prompt recovers more than another, on the same queries.

    Args:
        queries: at least one.
        before, after: KL of each query with both prompts, summed over its answer, in nats.
    """
    return _ratio([b - a for b, a in zip(before, after, strict=True)], [one.none for one in queries])


def difference(one: Sequence[AskedQuery], other: Sequence[AskedQuery]) -> Gain:
    """What the prompt recovers more on one set of queries than on another."""
    parts = [_ratio([q.none - q.prompt for q in queries], [q.none for q in queries]) for queries in (one, other)]
    return Gain(parts[0].value - parts[1].value, math.hypot(parts[0].error, parts[1].error))


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Gain:
    """Σ x / Σ n and its standard error √(m / (m − 1) Σ (x − ratio·n)²) / Σ n; an error of 0 for one query."""
    total, count = sum(denominators), len(denominators)
    if not total:
        return Gain(0.0, math.inf)
    value = sum(numerators) / total
    residuals = sum((x - value * n) ** 2 for x, n in zip(numerators, denominators, strict=True))
    return Gain(value, math.sqrt(residuals * count / max(1, count - 1)) / total)
