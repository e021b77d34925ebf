"""What is kept of the teacher while it writes its answers, or reads given ones: one pass serves all later stages.

    training targets     of training answers      moments_cache.py
    rows for matching    of training answers      rows.py
    hidden states        of evaluated answers     moments_cache.py

All are on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from softprompt_kernels.compress.teacher.moments_cache import TargetWriter
from softprompt_kernels.compress.teacher.rows import RowRecorder
from softprompt_kernels.models import FedTokens, QueryTap


class RowsAlone:
    """A `Recorder` that records rows for matching, and nothing else.

    Args:
        rows: records them.
    """

    def __init__(self, rows: RowRecorder) -> None:
        self.rows = rows

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap | None:
        """The tap for some of these tokens."""
        return self.rows.tap(fed)

    def add(self, number: int, hidden: Tensor) -> None:
        """Does nothing with the hidden states."""


class Recording:
    """A `Recorder` of a run. Examples are known by numbers, and the training examples come first.

    Args:
        train: how many training examples there are.
        evaluated: numbers of the examples that are evaluated.
        targets: writes training targets; None where they are not needed.
        rows: records rows for matching; None where they are not needed.
        states: writes the hidden states of evaluated examples; None where they are not needed.

    Attributes:
        seen: numbers of the examples whose hidden states have come.
    """

    def __init__(
        self,
        train: int,
        evaluated: Collection[int] = (),
        *,
        targets: TargetWriter | None = None,
        rows: RowRecorder | None = None,
        states: TargetWriter | None = None,
    ) -> None:
        self.train, self.evaluated = train, frozenset(evaluated)
        self.targets, self.rows, self.states = targets, rows, states
        self.seen: set[int] = set()

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap | None:
        """The tap for the training examples among these."""
        if self.rows is None:
            return None
        mine = [part for part in fed if any(number < self.train for number in part.sequences)]
        return self.rows.tap(mine) if mine else None

    def add(self, number: int, hidden: Tensor) -> None:
        """Receive `[n, d]`, the last hidden states that predict the output of an example."""
        self.seen.add(number)
        if self.targets is not None and number < self.train:
            self.targets.add(number, hidden)
        if self.states is not None and number in self.evaluated:
            self.states.add(number, hidden)
