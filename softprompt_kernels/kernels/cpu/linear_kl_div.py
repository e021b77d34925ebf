"""Divergence between the logits of two heads: row kernels in C++, and its GEMM where that is faster.

The driver, with the formula and the cost, is `kernels/host/fused_linear.py`.
"""

from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cpu.gemm import fastest_gemm
from softprompt_kernels.kernels.cpu.rows import add_tile_, divergence_, workspace
from softprompt_kernels.kernels.host import fused_linear
from softprompt_kernels.kernels.host.rows import HostKernels
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem


def host_kernels() -> HostKernels:
    """What the driver calls: the GEMM, the workspace and the row kernels."""
    return HostKernels(fastest_gemm(), workspace, divergence_, add_tile_)


def unsupported(problem: HeadProblem) -> str | None:
    """Why the problem is not supported, None if it is: every divergence on a CPU is, except in float64."""
    return native.unsupported_tensor("student_hidden", problem.student)


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and, if it is needed, ∂ loss[n] / ∂ student[n] [N, d]."""
    return fused_linear.forward(problem, need_gradient, host_kernels())


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n] by hidden states, weight and bias."""
    return fused_linear.backward(problem, row_scale, needs, host_kernels())
