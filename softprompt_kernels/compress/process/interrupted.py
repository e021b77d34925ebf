"""A run that was stopped by a signal, and where."""

from __future__ import annotations

from pathlib import Path
from signal import SIGINT
from typing import Literal


class Interrupted(Exception):
    """Matching or training was stopped by Ctrl-C, SIGTERM or SIGHUP. What is finished is saved, and the same call
    resumes from it.

    Args:
        unit: what the stage counts: "layer" of matching, "step" of training.
        step, steps: how many of them are saved, and how many there are.
        output: the folder of the run.
        signal: the number of the signal that stopped it.
    """

    def __init__(
        self, unit: Literal["layer", "step"], step: int, steps: int, output: Path, signal: int = SIGINT
    ) -> None:
        self.where = f"at step {step} of {steps}" if unit == "step" else f"matching with {step} of {steps} layers done"
        super().__init__(f"Stopped {self.where}; saved in {output}")
        self.unit, self.step, self.steps, self.output, self.signal = unit, step, steps, output, signal
