"""A rate range test (Smith, arXiv 1506.01186): a few steps of training with a learning rate that rises geometrically.

All steps have the same batch, so that the loss changes by the steps alone. The test starts where the training of the
run started, and ends when the loss is far above its start, because it says nothing more from there on.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.diagnose.causes.optimisation import rate_range
from softprompt_kernels.compress.distill.trainer import Prompt, Schedule, Trainer
from softprompt_kernels.compress.evaluate.diagnosis import RatePoint, RateTest
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.errors import SoftPromptError

STEPS = 20
LOWEST, HIGHEST = 1e-4, 1.0
"""The rates of the first and the last step, in standard deviations of what is trained: the last replaces it."""

BEYOND = 10.0
"""The test reaches at least so far below and above the rate of the run."""

FAR_ABOVE = 3.0
"""A loss of so many times that at the start ends the test."""


@dataclass(frozen=True)
class RisingRate(Schedule):
    """A learning rate that rises geometrically from `lowest` at the first step to `learning_rate` at the last."""

    lowest: float = LOWEST

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return self.lowest * (self.learning_rate / self.lowest) ** (step / max(1, self.steps - 1))


class _SameBatch(Trainer):
    """A trainer whose steps all have the first batch."""

    def batch_at(self, step: int) -> list[int]:
        return super().batch_at(0)


def rate_test(inputs: RunInputs, prompt: Prompt, taught: Taught, reporter: Reporter) -> RateTest:
    """The test of a run.

    Args:
        inputs: of the run.
        prompt: that the training started from. It is changed.
        taught: with the training examples and their targets.
        reporter: receives the progress.

    Raises:
        SoftPromptError: the loss is not finite before the first step.
    """
    begin, config = time.perf_counter(), inputs.config
    trainer = _SameBatch(
        inputs.model,
        prompt,
        taught.examples["train"],
        taught.targets,
        inputs.objective,
        schedule(config),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        relative=config.relative_learning_rate,
    )
    losses = [trainer.train_step().loss]  # before each step
    with reporter.progress("Rate range test", STEPS, "step") as advance:
        with suppress(SoftPromptError):  # the loss is not finite
            while len(losses) <= STEPS and losses[-1] <= FAR_ABOVE * losses[0]:
                losses.append(trainer.train_step().loss)
                advance(1, loss=losses[-1])
        advance(STEPS + 1 - len(losses))
    rates = [trainer.schedule.at(step) for step in range(STEPS)]
    points = tuple(RatePoint(rate=rate, loss=loss) for rate, loss in zip(rates, losses[1:], strict=False))
    test = RateTest(
        start_loss=losses[0],
        points=points,
        run_rate=config.learning_rate,
        suggested=None,
        seconds=time.perf_counter() - begin,
    )
    found = rate_range(test)
    return test if found is None else test.model_copy(update={"suggested": found.suggested})


def schedule(config: CompressConfig) -> RisingRate:
    """The rates of a test: from `LOWEST` to `HIGHEST`, or further where the rate of the run is near to an end."""
    lowest = min(LOWEST, config.learning_rate / BEYOND)
    return RisingRate(STEPS, max(HIGHEST, config.learning_rate * BEYOND), 0, lowest)
