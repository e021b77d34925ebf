"""Row work of the losses in C++: kernels in `csrc/cpu/losses/kl_rows.cpp` and `kl_tile.cpp`, on torch's threads."""

import threading

import torch
from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.host.chunks import CPU_WORKSPACE_BYTES
from softprompt_kernels.kernels.host.head_logits import Activation
from softprompt_kernels.kernels.host.rows import KlTileState
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState

_kept = threading.local()


def address(tensor: Tensor | None) -> int:
    """Of the first element, 0 for None."""
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
    weighted, plain = (None, None) if state.sums is None else state.sums.chunk(2)
    native.module().kl_tile(
        student=address(student),
        teacher=address(teacher),
        student_bias=address(student_activation.bias),
        teacher_bias=address(teacher_activation.bias),
        so_far=address(state.scalars),
        sum=address(weighted),
        total=address(plain),
        rows=student.shape[0],
        columns=student.shape[1],
        size=0 if weighted is None else weighted.shape[1],
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        sum_stride=0 if weighted is None else weighted.stride(0),
        total_stride=0 if plain is None else plain.stride(0),
        divergence=divergence.code,
        softcap=student_activation.softcap or 0.0,
        threads=torch.get_num_threads(),
    )


def exponentials_(logits: Tensor, bias: Tensor | None, scale: float, first: int, state: ExpectationState) -> None:
    """See `ExponentialsKernel` in `kernels/host/rows.py`."""
    mean = state.mean
    native.module().expectation_rows(
        logits=address(logits),
        bias=address(bias),
        labels=address(state.labels),
        label_logit=address(state.label_logit),
        largest=address(state.row_max),
        total=address(state.row_sum),
        bias_total=address(state.bias_sum),
        sum=address(mean),
        rows=logits.shape[0],
        columns=logits.shape[1],
        size=0 if mean is None else mean.shape[1],
        stride=logits.stride(0),
        sum_stride=0 if mean is None else mean.stride(0),
        first_column=first,
        bias_scale=scale,
        threads=torch.get_num_threads(),
    )


def workspace(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised matrix, which the thread's next one will overwrite.

    It is kept for the thread: new pages for the logits of a chunk cost as much time as the row work on them. What is
    larger than the budget, which only an explicit chunk_tokens or a huge vocabulary can ask for, is not kept.
    """
    size = rows * columns
    if size * dtype.itemsize > CPU_WORKSPACE_BYTES:
        return torch.empty(rows, columns, dtype=dtype)
    kept: Tensor | None = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < size or kept.dtype != dtype:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            kept = _kept.workspace = torch.empty(size, dtype=dtype)
    return kept[:size].view(rows, columns)
