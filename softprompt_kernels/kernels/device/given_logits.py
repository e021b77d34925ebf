"""Divergence between given logits on a GPU, with the row kernels of a backend.

The forward reads both logits once (twice for jsd) and keeps 5 numbers per row. The backward reads both logits once more
and writes the gradient. Logits are read in their own dtype and with their own strides. Forward and backward are one
launch each, and allocate only what they return.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.device.rows import STATISTICS, Gradient, Launch, Logits, RowKernels, device_rows
from softprompt_kernels.kernels.problems.loss import LogitsProblem


def forward(problem: LogitsProblem, row_kernels: RowKernels[Any]) -> tuple[Tensor, Tensor]:
    """Loss of each row [N], and the statistics that the backward needs [N, STATISTICS], both fp32."""
    (loss, statistics), launches = plan_forward(problem, row_kernels)
    row_kernels.run(launches, loss.device)
    return loss, statistics


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor, row_kernels: RowKernels[Any]) -> Tensor:
    """Gradient of Σ_n row_scale[n] · loss[n] by the student's logits; 0 in vocabulary entries that are cut."""
    gradient, launches = plan_backward(problem, row_scale, statistics, row_kernels)
    row_kernels.run(launches, gradient.device)
    return gradient


def plan_forward(problem: LogitsProblem, row_kernels: RowKernels[Launch]) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Losses and statistics, not yet written, and the launches that write them."""
    loss = problem.student.new_empty(problem.student.shape[0], dtype=torch.float32)
    statistics = loss.new_empty(loss.shape[0], STATISTICS)
    launch = row_kernels.divergence(
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
    problem: LogitsProblem, row_scale: Tensor, statistics: Tensor, row_kernels: RowKernels[Launch]
) -> tuple[Tensor, list[Launch]]:
    """The gradient, not yet written, and the launches that write it."""
    gradient = torch.empty(problem.student.shape, dtype=problem.student.dtype, device=problem.student.device)
    launch = row_kernels.divergence(
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
