"""Divergence between the logits of two heads, row kernels in Triton. The driver is `device/chunked_logits.py`."""

from torch import Tensor

from softprompt_kernels.kernels.device import chunked_logits
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.losses.plan import TritonRows
from softprompt_kernels.kernels.triton.targets import Target, target_of


def unsupported(problem: HeadProblem) -> str | None:
    """It serves every divergence, with a student in fp32, bf16 and fp16; the teacher may have any dtype."""
    return runtime.unsupported_tensor("student_hidden", problem.student)


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of each row [N] in fp32 and, if needed, ∂ loss[n] / ∂ student[n] [N, d], bf16 for bf16, else fp32."""
    return chunked_logits.forward(problem, need_gradient, TritonRows(target_of(problem.student.device)))


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n] by hidden states, weight and bias, each in its input's dtype."""
    return chunked_logits.backward(problem, row_scale, needs, TritonRows(target_of(problem.student.device)))


def plan(problem: HeadProblem, need_gradient: bool, target: Target) -> list[Launch]:
    """The launches for the first chunk of a problem."""
    return chunked_logits.plan(problem, need_gradient, TritonRows(target))
