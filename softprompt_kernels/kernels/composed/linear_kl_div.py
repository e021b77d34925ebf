"""Divergence between the logits of two heads, with row work by PyTorch. See `kernels/host/fused_linear.py`."""

import torch
from torch import Tensor

from softprompt_kernels.kernels.composed.rows import SCRATCH_BUFFERS, divergence_
from softprompt_kernels.kernels.host import fused_linear as driver
from softprompt_kernels.kernels.host.chunks import block_size
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.host.head_logits import Activation
from softprompt_kernels.kernels.problems.loss import Divergence, HeadGradients, HeadNeeds, HeadProblem


def unsupported(problem: HeadProblem) -> str | None:
    """It skips rows by looking at the weights, which would stop another device."""
    device = problem.student.device
    return None if device.type == "cpu" else f"student_hidden is on {device}, and it serves the CPU"


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    return driver.forward(problem, need_gradient, _BACKEND)


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Σ_n row_scale[n] · loss[n], derived by hidden states, weight and bias."""
    return driver.backward(problem, row_scale, needs, _BACKEND)


def _row_work_(
    student: Tensor,
    teacher: Tensor,
    student_activation: Activation,
    teacher_activation: Activation,
    divergence: Divergence,
    need_gradient: bool,
) -> Tensor:
    """See `RowWork` of `kernels/host/chunked_logits.py`.

    In cache-sized blocks of rows, and with the gradient whether it is needed or not.
    """
    count, vocab = student.shape
    step = min(count, block_size(vocab))
    capped = student_activation.softcap is not None
    scratch = student.new_empty(SCRATCH_BUFFERS + capped, step, vocab)
    loss = student.new_empty(count)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        block, other = student[rows], teacher[rows]
        difference, spare, *slope = scratch[:, : block.shape[0]]
        _activate_(block, student_activation, slope[0] if slope else None)
        _activate_(other, teacher_activation, None)
        loss[rows] = divergence_(block, other, divergence, (difference, spare))
        if slope:
            block.mul_(slope[0])
    return loss


def _activate_(products: Tensor, activation: Activation, slope: Tensor | None) -> None:
    """Products become logits over T; tanh' goes to `slope`."""
    if activation.bias is not None:
        products += activation.bias
    if activation.softcap is not None:
        products.tanh_()
        if slope is not None:
            torch.mul(products, products, out=slope).neg_().add_(1)
        products.mul_(activation.softcap)


def _allocate(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)


_BACKEND = driver.Backend(TORCH, _allocate, _row_work_, None)
