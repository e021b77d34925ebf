"""Divergence between given logits: the definition. Memory is O(N · V)."""

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.loss import LogitsProblem, no_statistics
from softprompt_kernels.kernels.reference import divergence

STATISTICS = 0


def unsupported(problem: LogitsProblem) -> str | None:
    """The reference serves every problem."""
    return None


def forward(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Loss of each row [N] in the compute dtype, and no statistics [N, 0]."""
    loss = _rows(problem)[0]
    return loss, no_statistics(loss)


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
    """Gradient of Σ_n row_scale[n] · loss[n] by the student's logits; 0 in vocabulary entries that are cut."""
    full = torch.zeros_like(problem.student)
    full[:, : problem.vocab] = (_rows(problem)[1] * row_scale[:, None]).to(full.dtype)
    return full


def _rows(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient by the student's logits [N, vocab]."""
    temperature = problem.divergence.temperature
    student, teacher = (
        t[:, : problem.vocab].to(problem.compute_dtype) / temperature for t in (problem.student, problem.teacher)
    )
    loss, gradient = divergence.rows(student, teacher, problem.divergence)
    loss, gradient = loss * temperature**2, gradient * temperature
    if problem.weights is not None:
        loss = torch.where(problem.weights == 0, 0, loss)
        gradient = torch.where(problem.weights[:, None] == 0, 0, gradient)
    return loss, gradient
