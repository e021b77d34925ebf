"""Divergence between the logits of two heads, row work and, where they are faster, products in C++.

See `kernels/host/fused_linear.py`.
"""

from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cpu.gemm import products
from softprompt_kernels.kernels.cpu.rows import add_tile_, divergence_, workspace
from softprompt_kernels.kernels.host import fused_linear
from softprompt_kernels.kernels.host.rows import Backend
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem


def backend() -> Backend:
    """What the driver is given."""
    return Backend(products(), workspace, divergence_, add_tile_)


def unsupported(problem: HeadProblem) -> str | None:
    """It serves every divergence on a CPU that is not computed in float64."""
    return native.unsupported_tensor("student_hidden", problem.student)


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    return fused_linear.forward(problem, need_gradient, backend())


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Σ_n row_scale[n] · loss[n], derived by hidden states, weight and bias."""
    return fused_linear.backward(problem, row_scale, needs, backend())
