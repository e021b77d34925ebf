"""What a training remembers from step to step beside σ and the optimiser: the best held-out evaluation, and a plateau.

    best     the evaluation of lowest KL; of two that are equal, the first
    waited   evaluations since then
    stop     when waited = patience

It is a value that is replaced as a whole, and that every checkpoint holds. So a resumed run decides as an unbroken one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from softprompt_kernels.compress.distill.trainer import StepReport

_PROGRESS, _PENDING = "progress", "pending"


class Progress(NamedTuple):
    """How far a training is.

    Args:
        recorded: the last step whose record is in the metrics, with its held-out evaluation if it has one.
        best_step, best_kl: of the best held-out evaluation; None before the first.
        waited: evaluations since that one.
    """

    recorded: int = 0
    best_step: int | None = None
    best_kl: float | None = None
    waited: int = 0

    def after(self, step: int, kl: float | None) -> Progress:
        """The progress once a step is recorded.

        Args:
            step: counted from 1; 0 for the prompt before training.
            kl: of its held-out evaluation, nats per token; None without one. NaN is no improvement.
        """
        if kl is None or (self.best_step is not None and step <= self.best_step):  # the latter: repeated after a crash
            return self._replace(recorded=step)
        if self.best_kl is None or kl < self.best_kl:
            return Progress(step, step, math.inf if math.isnan(kl) else kl)
        return self._replace(recorded=step, waited=self.waited + 1)

    def notes(self, last: StepReport | None) -> dict[str, str]:
        """These figures as notes of a checkpoint, with the report of the last step if that is not recorded yet."""
        pending = {} if last is None or last.step <= self.recorded else {_PENDING: json.dumps(asdict(last))}
        return {_PROGRESS: json.dumps(self._asdict()), **pending}


def read_notes(notes: Mapping[str, str], step: int) -> tuple[Progress, StepReport | None]:
    """The progress in the notes of a checkpoint, and the report of its step if that has yet to be recorded.

    Args:
        notes: of the checkpoint; those of older versions have no progress.
        step: of the checkpoint.
    """
    saved: dict[str, Any] = json.loads(notes.get(_PROGRESS, "null")) or {"recorded": step}
    pending = json.loads(notes.get(_PENDING, "null"))
    return Progress(**saved), None if pending is None else StepReport(**pending)
