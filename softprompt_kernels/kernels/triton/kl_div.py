"""Divergence between given logits. See `kl_rows.py` for the row work.

The forward reads both logits once (twice for jsd) and keeps 5 numbers a row; the backward reads them once more and
writes the gradient. Logits are read in their own dtype and with their own strides. One launch each, nothing allocated
but what is returned.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.device.rows import STATISTICS, Gradient, Logits, device_rows
from softprompt_kernels.kernels.loss_problem import LogitsProblem
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch, run_all
from softprompt_kernels.kernels.triton.rows import TritonRows
from softprompt_kernels.kernels.triton.targets import Target, target_of

__all__ = ["STATISTICS", "backward", "forward", "plan_backward", "plan_forward", "unsupported"]


def unsupported(problem: LogitsProblem) -> str | None:
    """It serves every divergence of fp32, bf16 and fp16 logits."""
    return runtime.unsupported_tensor("student_logits", problem.student) or runtime.unsupported_tensor(
        "teacher_logits", problem.teacher
    )


def forward(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """Loss of each row [N], and what the backward needs to know of it [N, STATISTICS]."""
    (loss, statistics), launches = plan_forward(problem, target_of(problem.student.device))
    run_all(launches, problem.student.device)
    return loss, statistics


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
    """Σ_n row_scale[n] · loss[n], derived by the student's logits; 0 in vocabulary rows that are cut."""
    gradient, launches = plan_backward(problem, row_scale, statistics, target_of(problem.student.device))
    run_all(launches, problem.student.device)
    return gradient


def plan_forward(problem: LogitsProblem, target: Target) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Losses and statistics, and the launches that fill them."""
    rows = problem.student.shape[0]
    loss = problem.student.new_empty(rows, dtype=torch.float32)
    statistics = loss.new_empty(rows, STATISTICS)
    launch = TritonRows(target).divergence(
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
    problem: LogitsProblem, row_scale: Tensor, statistics: Tensor, target: Target
) -> tuple[Tensor, list[Launch]]:
    """The gradient, and the launches that fill it."""
    gradient = torch.empty(problem.student.shape, dtype=problem.student.dtype, device=problem.student.device)
    launch = TritonRows(target).divergence(
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
