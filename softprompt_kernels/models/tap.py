"""Watching a model: the queries of chosen tokens in every layer, and what the attention gave them.

A `QueryTap` names the tokens of one forward. A `QueryRecorder` is told which tokens of which sequences are about to run
and answers with a tap, so that sequences can be recorded while they are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ScoreFunction:
    """How a layer turns q·k into a score: `softcap·tanh(scale·q·k / softcap)`, over the last `window` positions."""

    scale: float
    softcap: float | None = None
    window: int | None = None


class QuerySink(Protocol):
    """Receives the queries of each layer, and what the attention gave them."""

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
        """`query [n, Hq, D]` after the rotary embedding, `out [n, Hq, Dv]`, `lse [n, Hq]` fp32 over all keys."""


@dataclass(frozen=True, eq=False)
class QueryTap:
    """Hands the queries of some tokens to a sink.

    Args:
        tokens: `[n]` int64, indices into the flattened `[B·M]` tokens of the forward.
        sink: receives them, layer by layer.
    """

    tokens: Tensor
    sink: QuerySink


@dataclass(frozen=True)
class FedTokens:
    """Consecutive tokens of a sequence that go through the model in one forward.

    The first tokens of a sequence, up to its whole input, are one of these; what was sampled comes in others.

    Args:
        sequences: the numbers of the sequences that these tokens belong to. Sequences with the same input share its
            tokens.
        tokens: token ids.
        start: the own position of the first one: 0 for the beginning of a sequence.
        place: the index of the first one in the flattened tokens of the forward.
    """

    sequences: tuple[int, ...]
    tokens: tuple[int, ...]
    start: int
    place: int


class QueryRecorder(Protocol):
    """Chooses tokens to watch."""

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap | None:
        """The tap for a forward of the tokens of `fed`, in their order; None to watch none of them."""
