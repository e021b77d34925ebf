"""Divergence between given logits, in Triton. The driver is `device/given_logits.py`, the row kernel `kl_rows.py`."""

from torch import Tensor

from softprompt_kernels.kernels.device import given_logits
from softprompt_kernels.kernels.device.rows import STATISTICS
from softprompt_kernels.kernels.problems.loss import LogitsProblem
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.losses.plan import TritonRows
from softprompt_kernels.kernels.triton.targets import Target, target_of

__all__ = ["STATISTICS", "backward", "forward", "plan_backward", "plan_forward", "unsupported"]


def unsupported(problem: LogitsProblem) -> str | None:
    """It serves every divergence, with logits in fp32, bf16 and fp16."""
    return runtime.unsupported_tensor("student_logits", problem.student) or runtime.unsupported_tensor(
        "teacher_logits", problem.teacher
    )


def forward(problem: LogitsProblem) -> tuple[Tensor, Tensor]:
    """The loss of each row [N] in fp32, and the statistics [N, STATISTICS] that the backward needs."""
    return given_logits.forward(problem, TritonRows(target_of(problem.student.device)))


def backward(problem: LogitsProblem, row_scale: Tensor, statistics: Tensor) -> Tensor:
    """The gradient of Σ_n row_scale[n] · loss[n] by the student's logits; 0 in the columns that `valid_vocab` cuts."""
    return given_logits.backward(problem, row_scale, statistics, TritonRows(target_of(problem.student.device)))


def plan_forward(problem: LogitsProblem, target: Target) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Losses and statistics, and the launches that fill them."""
    return given_logits.plan_forward(problem, TritonRows(target))


def plan_backward(
    problem: LogitsProblem, row_scale: Tensor, statistics: Tensor, target: Target
) -> tuple[Tensor, list[Launch]]:
    """The gradient, and the launches that fill it."""
    return given_logits.plan_backward(problem, row_scale, statistics, TritonRows(target))
