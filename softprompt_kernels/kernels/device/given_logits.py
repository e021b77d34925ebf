"""Divergence between given logits on a GPU: row work by a backend.

The forward reads both logits once (twice for jsd) and keeps 5 numbers a row; the backward reads them once more and
writes the gradient. Logits are read in their own dtype and with their own strides. One launch each, nothing allocated
but what is returned.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.device.rows import STATISTICS, Gradient, Launch, Logits, RowWork, device_rows
from softprompt_kernels.kernels.problems.loss import LogitsProblem


def forward(problem: LogitsProblem, row_work: RowWork[Any]) -> tuple[Tensor, Tensor]:
    """Loss of each row [N], and what the backward needs to know of it [N, STATISTICS]."""
    (loss, statistics), launches = plan_forward(problem, row_work)
    row_work.run(launches, loss.device)
    return loss, statistics


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor, row_work: RowWork[Any]) -> Tensor:
    """Σ_n row_scale[n] · loss[n], derived by the student's logits; 0 in vocabulary rows that are cut."""
    gradient, launches = plan_backward(problem, row_scale, statistics, row_work)
    row_work.run(launches, gradient.device)
    return gradient


def plan_forward(problem: LogitsProblem, row_work: RowWork[Launch]) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Losses and statistics, and the launches that fill them."""
    loss = problem.student.new_empty(problem.student.shape[0], dtype=torch.float32)
    statistics = loss.new_empty(loss.shape[0], STATISTICS)
    launch = row_work.divergence(
        _logits(problem),
        problem.vocab,
        problem.divergence,
        device_rows(problem.weights),
        loss=loss,
        loss_scale=problem.divergence.temperature**2,
        statistics=statistics,
    )
    return (loss, statistics), [launch]


def plan_backward(
    problem: LogitsProblem, row_scale: Tensor, statistics: Tensor, row_work: RowWork[Launch]
) -> tuple[Tensor, list[Launch]]:
    """The gradient, and the launches that fill it."""
    gradient = torch.empty(problem.student.shape, dtype=problem.student.dtype, device=problem.student.device)
    launch = row_work.divergence(
        _logits(problem),
        problem.vocab,
        problem.divergence,
        device_rows(problem.weights),
        statistics=statistics,
        gradient=Gradient(gradient, device_rows(row_scale), problem.divergence.temperature),
    )
    return gradient, [launch]


def _logits(problem: LogitsProblem) -> Logits:
    return Logits(problem.student, problem.teacher, scale=1 / problem.divergence.temperature)
