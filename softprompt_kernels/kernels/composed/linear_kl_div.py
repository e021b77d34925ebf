"""Divergence between the logits of two heads, with row kernels in PyTorch. The driver is `host/fused_linear.py`."""

import torch
from torch import Tensor

from softprompt_kernels.kernels.composed.rows import SCRATCH_BUFFERS, divergence_
from softprompt_kernels.kernels.host import fused_linear
from softprompt_kernels.kernels.host.chunks import block_size
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.host.head_logits import Activation
from softprompt_kernels.kernels.host.rows import HostKernels
from softprompt_kernels.kernels.problems.loss import Divergence, HeadGradients, HeadNeeds, HeadProblem


def unsupported(problem: HeadProblem) -> str | None:
    """It serves the CPU: to skip rows it reads the weights, and on other devices the host would wait for them."""
    device = problem.student.device
    return None if device.type == "cpu" else f"student_hidden is on {device}, and it serves the CPU"


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    return fused_linear.forward(problem, need_gradient, _KERNELS)


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n], by hidden states, weight and bias."""
    return fused_linear.backward(problem, row_scale, needs, _KERNELS)


def _divergence_kernel_(
    student: Tensor,
    teacher: Tensor,
    student_activation: Activation,
    teacher_activation: Activation,
    divergence: Divergence,
    need_gradient: bool,
) -> Tensor:
    """See `DivergenceKernel` in `host/rows.py`.

    Works on blocks of rows that fit the cache, and computes the gradient whether it is needed or not.
    """
    count, vocab = student.shape
    step = min(count, block_size(vocab))
    has_softcap = student_activation.softcap is not None
    scratch = student.new_empty(SCRATCH_BUFFERS + has_softcap, step, vocab)
    loss = student.new_empty(count)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        student_block, teacher_block = student[rows], teacher[rows]
        difference, spare, *slope = scratch[:, : student_block.shape[0]]
        _activate_(student_block, student_activation, slope[0] if slope else None)
        _activate_(teacher_block, teacher_activation, None)
        loss[rows] = divergence_(student_block, teacher_block, divergence, (difference, spare))
        if slope:
            student_block.mul_(slope[0])
    return loss


def _activate_(logits: Tensor, activation: Activation, slope: Tensor | None) -> None:
    """W h becomes logits over T, in place; tanh' goes to `slope`."""
    if activation.bias is not None:
        logits += activation.bias
    if activation.softcap is not None:
        logits.tanh_()
        if slope is not None:
            torch.mul(logits, logits, out=slope).neg_().add_(1)
        logits.mul_(activation.softcap)


def _allocate(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)


_KERNELS = HostKernels(TORCH, _allocate, _divergence_kernel_, None)
