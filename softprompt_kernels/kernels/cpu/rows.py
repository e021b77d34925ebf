"""Calls of the row kernels of the losses in C++, `csrc/cpu/losses/kl_rows.cpp` and `kl_tile.cpp`, on torch's threads.

Each works in place on logits [n, columns] that the driver has computed.
"""

import threading

import torch
from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.host.chunks import CPU_WORKSPACE_BYTES
from softprompt_kernels.kernels.host.head_logits import Activation
from softprompt_kernels.kernels.host.rows import KlTileState
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState
from softprompt_kernels.kernels.ranges import kernel_range

_kept = threading.local()


def address(tensor: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def divergence_(
    student: Tensor,
    teacher: Tensor,
    student_activation: Activation,
    teacher_activation: Activation,
    divergence: Divergence,
    need_gradient: bool,
) -> Tensor:
    """See `DivergenceKernel` in `kernels/host/rows.py`."""
    loss = student.new_empty(student.shape[0])
    with kernel_range("kl_rows", *student.shape):
        native.module().kl_rows(
            student=address(student),
            teacher=address(teacher),
            student_bias=address(student_activation.bias),
            teacher_bias=address(teacher_activation.bias),
            loss=address(loss),
            rows=student.shape[0],
            vocab=student.shape[1],
            student_stride=student.stride(0),
            teacher_stride=teacher.stride(0),
            divergence=divergence.code,
            beta=divergence.beta,
            softcap=student_activation.softcap or 0.0,
            gradient=need_gradient,
            threads=torch.get_num_threads(),
        )
    return loss


def add_tile_(
    student: Tensor,
    teacher: Tensor,
    student_activation: Activation,
    teacher_activation: Activation,
    divergence: Divergence,
    state: KlTileState,
) -> None:
    """See `DivergenceTileKernel` in `kernels/host/rows.py`."""
    gradient, mean = (None, None) if state.sums is None else state.sums.chunk(2)
    with kernel_range("kl_tile", *student.shape):
        native.module().kl_tile(
            student=address(student),
            teacher=address(teacher),
            student_bias=address(student_activation.bias),
            teacher_bias=address(teacher_activation.bias),
            state=address(state.scalars),
            gradient_accumulator=address(gradient),
            mean_accumulator=address(mean),
            rows=student.shape[0],
            columns=student.shape[1],
            size=0 if mean is None else mean.shape[1],
            student_stride=student.stride(0),
            teacher_stride=teacher.stride(0),
            gradient_stride=0 if gradient is None else gradient.stride(0),
            mean_stride=0 if mean is None else mean.stride(0),
            divergence=divergence.code,
            softcap=student_activation.softcap or 0.0,
            threads=torch.get_num_threads(),
        )


def exponentials_(logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState) -> None:
    """See `ExponentialsKernel` in `kernels/host/rows.py`."""
    mean = state.mean
    with kernel_range("expectation_rows", *logits.shape):
        native.module().expectation_rows(
            logits=address(logits),
            bias=address(bias),
            labels=address(state.labels),
            label_logit=address(state.label_logit),
            row_max=address(state.row_max),
            row_sum=address(state.row_sum),
            bias_sum=address(state.bias_sum),
            mean=address(mean),
            rows=logits.shape[0],
            columns=logits.shape[1],
            size=0 if mean is None else mean.shape[1],
            stride=logits.stride(0),
            mean_stride=0 if mean is None else mean.stride(0),
            first_column=first,
            bias_scale=scale,
            threads=torch.get_num_threads(),
        )


def workspace(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised matrix [rows, columns]. The next call in the same thread returns the same memory.

    Each thread keeps its memory, because new pages for the logits of a chunk cost as much time as the row kernel on
    them. A matrix of more than CPU_WORKSPACE_BYTES is not kept. Only an explicit chunk_tokens or a huge vocabulary
    needs one.
    """
    size = rows * columns
    if size * dtype.itemsize > CPU_WORKSPACE_BYTES:
        return torch.empty(rows, columns, dtype=dtype)
    kept: Tensor | None = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < size or kept.dtype != dtype:
        with torch.inference_mode(False):  # outside of that mode, a tensor made in it cannot be written to
            kept = _kept.workspace = torch.empty(size, dtype=dtype)
    return kept[:size].view(rows, columns)
