"""Divergence between the logits of two heads, one chunk of tokens at a time: GEMMs by cuBLAS, a backend's row kernels.

A chunk of n tokens costs, in units of one GEMM of the head's size, U = 2·n·V·d FLOP:

    logits of student and teacher    2U   one GEMM [h_s; h_t] Wᵀ for a shared head, which reads W once; in fp32
    row kernel                            reads them twice (jsd: three times), writes ∂ loss / ∂ logits
    gradient of the hidden states    1U   (∂ loss / ∂ logits) W

In fp32, the gradient by the logits overwrites the student's logits. For a 16-bit head it is rounded once, after
p_s − p_t, into a 16-bit matrix of its own, which the tensor cores can multiply. It is scaled by 2¹⁰ in fp16, which has
no small numbers. A trained head costs 1U more for the gradient of its weight, and computes the logits again in the
backward.

Memory: 10 V + 8 d bytes per token of a chunk for a 16-bit head, 8 V + 12 d for fp32. There are two differences from the
CPU's driver. The hidden states are not scaled before the GEMMs, since that would round 16-bit ones. Tokens of weight 0
stay in the chunks, since their number is not known without waiting for the device; the row kernel skips them without
reading their logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.device import gemm
from softprompt_kernels.kernels.device.memory import aligned, chunk_size
from softprompt_kernels.kernels.device.rows import Gradient, Launch, Logits, RowKernels, device_rows
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem

_FP16_SCALE = 1024.0  # of the gradient by the logits
_SMALLEST = 2.0**-126  # normal number of fp32. Masked vocabulary entries are -inf at any scale but 0


def forward(problem: HeadProblem, need_gradient: bool, row_kernels: RowKernels[Any]) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N] in fp32, and ∂ loss[n] / ∂ student[n] [N, d] if it is needed: bf16 for bf16, else fp32."""
    student = problem.student
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    gradient = None
    if need_gradient:
        dtype = torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32
        gradient = student.new_empty(student.shape, dtype=dtype)
    for chunk in _chunks(problem, loss, need_gradient, row_kernels):
        if gradient is not None:
            pulled = gemm.pull_back(chunk.by_logits, problem.head.weight)
            torch.mul(pulled, _factor(problem), out=gradient[chunk.tokens])
    return loss, gradient


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds, row_kernels: RowKernels[Any]) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n], by hidden states, weight and bias, each in its input's dtype."""
    head, student = problem.head, problem.student
    row_scale = row_scale.float()
    # The head's gradients are summed in units of the largest row_scale, so that 16-bit operands do not underflow.
    unit = row_scale.abs().amax() if row_scale.numel() else row_scale.new_zeros(())
    relative = row_scale / torch.where(unit == 0, 1.0, unit)
    hidden = torch.empty_like(student, memory_format=torch.contiguous_format) if needs.hidden else None
    weight = student.new_zeros(head.weight.shape, dtype=torch.float32) if needs.weight else None
    bias = student.new_zeros(head.weight.shape[0], dtype=torch.float32) if needs.bias else None
    for chunk in _chunks(problem, student.new_empty(student.shape[0], dtype=torch.float32), True, row_kernels):
        scale = row_scale[chunk.tokens, None] * _factor(problem)
        if hidden is not None:
            hidden[chunk.tokens] = gemm.pull_back(chunk.by_logits, head.weight).mul_(scale)
        share = relative[chunk.tokens, None]
        if weight is not None:
            operand = _masked(student[chunk.tokens], problem.weights, chunk.tokens).float() * share
            gemm.add_outer(weight, chunk.by_logits, operand.to(chunk.by_logits.dtype))
        if bias is not None:
            _add_columns(bias, chunk.by_logits, share)
    unit = unit * _factor(problem)
    return HeadGradients(
        hidden,
        None if weight is None else weight.mul_(unit).to(head.weight.dtype),
        None if bias is None or head.bias is None else bias.mul_(unit).to(head.bias.dtype),
    )


# --- chunks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    """The buffers of a chunk of tokens, beside its hidden states."""

    logits: Tensor  # [2 n, V] fp32, rows aligned: students, then teachers
    gradient: Tensor | None  # [n, V] in 16 bits; None: the gradient overwrites the students' logits
    bias: Tensor | None  # [V] fp32
    teacher_bias: Tensor | None

    @classmethod
    def of(cls, problem: HeadProblem, tokens: int, need_gradient: bool) -> "Workspace":
        """For chunks of at most `tokens` tokens."""
        student, vocab = problem.student, problem.head.weight.shape[0]
        logits = student.new_empty(2 * tokens, aligned(vocab), dtype=torch.float32)[:, :vocab]
        gradient = None
        if need_gradient and student.dtype in gemm.SIXTEEN_BITS:
            gradient = student.new_empty(tokens, aligned(vocab))[:, :vocab]
        bias, teacher_bias = device_rows(problem.head.bias), device_rows(problem.teacher_head.bias)
        return cls(logits, gradient, bias, teacher_bias)


@dataclass(frozen=True)
class _Chunk:
    tokens: slice
    by_logits: Tensor  # [n, V] ∂ loss / ∂ (W h + bias), up to the constant `_factor`; the next chunk overwrites it


def plan_rows(
    problem: HeadProblem,
    workspace: Workspace,
    tokens: slice,
    loss: Tensor,
    need_gradient: bool,
    row_kernels: RowKernels[Launch],
) -> tuple[Launch, Tensor]:
    """The row kernel of a chunk whose logits are in the workspace, and the tensor that gets the gradient by them."""
    count, head, temperature = tokens.stop - tokens.start, problem.head, problem.divergence.temperature
    student, teacher = workspace.logits[:count], workspace.logits[count : 2 * count]
    logits = Logits(
        student,
        teacher,
        workspace.bias,
        workspace.teacher_bias,
        scale=_not_zero((head.softcap or head.logit_scale) / temperature),
        inner=None if head.softcap is None else head.logit_scale / head.softcap,
    )
    out = student if workspace.gradient is None else workspace.gradient[:count]
    weights = device_rows(problem.weights)
    launch = row_kernels.divergence(
        logits,
        head.weight.shape[0],
        problem.divergence,
        None if weights is None else weights[tokens],
        loss=loss[tokens],
        loss_scale=temperature**2,
        gradient=Gradient(out, scale=_gradient_scale(problem)) if need_gradient else None,
    )
    return launch, out


def plan(problem: HeadProblem, need_gradient: bool, row_kernels: RowKernels[Launch]) -> list[Launch]:
    """The launches of a problem's first chunk, for inspection, also on the meta device.

    Those of the other chunks differ in their pointers, and that of the last in its rows. `forward` and `backward` call
    GEMMs between them.
    """
    size = _chunk_size(problem, need_gradient)
    tokens = slice(0, min(size, problem.student.shape[0]))
    loss = problem.student.new_empty(problem.student.shape[0], dtype=torch.float32)
    workspace = Workspace.of(problem, size, need_gradient)
    return [plan_rows(problem, workspace, tokens, loss, need_gradient, row_kernels)[0]]


def _chunks(problem: HeadProblem, loss: Tensor, need_gradient: bool, row_kernels: RowKernels[Any]) -> Iterator[_Chunk]:
    """Writes `loss` chunk by chunk, and yields the gradients by the logits."""
    student, teacher = problem.student, problem.teacher
    tokens = student.shape[0]
    size = _chunk_size(problem, need_gradient)
    workspace = Workspace.of(problem, size, need_gradient)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        count = rows.stop - start
        if problem.teacher_head is problem.head and teacher.dtype == student.dtype:
            both = torch.cat((student[rows], teacher[rows]))
            gemm.head_logits(workspace.logits[: 2 * count], both, problem.head.weight)
        else:
            gemm.head_logits(workspace.logits[:count], student[rows], problem.head.weight)
            gemm.head_logits(workspace.logits[count : 2 * count], teacher[rows], problem.teacher_head.weight)
        launch, by_logits = plan_rows(problem, workspace, rows, loss, need_gradient, row_kernels)
        row_kernels.run([launch], student.device)
        yield _Chunk(rows, by_logits)


def _chunk_size(problem: HeadProblem, need_gradient: bool) -> int:
    is_16_bit = problem.student.dtype in gemm.SIXTEEN_BITS
    size = problem.student.shape[1]
    logits = (10 if is_16_bit and need_gradient else 8) * aligned(problem.head.weight.shape[0])
    hidden = 2 * size * problem.student.itemsize + (4 * size if need_gradient else 0)
    return chunk_size(problem.student.shape[0], problem.chunk_tokens, logits + hidden)


def _not_zero(scale: float) -> float:
    return scale if abs(scale) > _SMALLEST else _SMALLEST


def _gradient_scale(problem: HeadProblem) -> float:
    return _FP16_SCALE if problem.student.dtype == torch.float16 else 1.0


def _factor(problem: HeadProblem) -> float:
    """T² of the loss times logit_scale / T of the logits, over the scale that keeps fp16 from underflow."""
    return problem.head.logit_scale * problem.divergence.temperature / _gradient_scale(problem)


def _masked(hidden: Tensor, weights: Tensor | None, tokens: slice) -> Tensor:
    """Hidden states, with 0 in skipped rows: these may hold NaN, and 0 · NaN is NaN."""
    return hidden if weights is None else torch.where(weights[tokens, None] == 0, 0, hidden)


def _add_columns(sums: Tensor, gradient: Tensor, share: Tensor) -> None:
    """sums [V] += gradient [n, V]ᵀ share [n, 1]; with a 16-bit gradient, share is split into two parts."""
    if gradient.dtype == torch.float32:
        sums.addmv_(gradient.mT, share.squeeze(1))
        return
    both = sums.new_zeros(sums.shape[0], 2)
    gemm.add_outer(both, gradient, torch.cat(gemm.split(share, gradient.dtype), 1))
    sums += both.sum(1)
