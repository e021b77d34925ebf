"""Starts all implementations of a training step from one problem, and checks that they do the same work.

All get the same batch and start from the same prompt. So their first losses must be the same within 1e-4; if they are
not, nothing is timed. The suite `step` then times further steps in turns, see bench_step.py. Memory: see memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.step.implementations import IMPLEMENTATIONS, StepImplementation
from benchmarks.step.problem import Problem
from softprompt_kernels.errors import SoftPromptError

LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class FirstStep:
    """All implementations after one step each.

    Args:
        implementations: by name; ours is the first, the baseline the last.
        losses: of that step, in nats per token.
        gradient_difference: ‖ours − baseline's‖ / ‖baseline's‖ of the prompt's gradients in that step.
    """

    implementations: dict[str, StepImplementation]
    losses: dict[str, float]
    gradient_difference: float


def first_step(problem: Problem) -> FirstStep:
    """Load all implementations and take a step with each.

    Raises:
        SoftPromptError: the losses differ.
    """
    started: dict[str, StepImplementation] = {
        name: kind(problem, kind.load(problem.model)) for name, kind in IMPLEMENTATIONS.items()
    }
    losses = {name: implementation.step() for name, implementation in started.items()}
    check_same_loss(losses)
    ours, *_, baseline = (implementation.gradient() for implementation in started.values())
    return FirstStep(started, losses, float((ours - baseline).norm() / baseline.norm()))


def check_same_loss(losses: dict[str, float]) -> None:
    """Check that all losses are the same: else the implementations do different work.

    Raises:
        SoftPromptError: two losses are more than `LOSS_TOLERANCE` apart, or one is not a number.
    """
    if not max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE:
        raise SoftPromptError(f"loss: got {losses}, accepted are losses that are the same within {LOSS_TOLERANCE}")
