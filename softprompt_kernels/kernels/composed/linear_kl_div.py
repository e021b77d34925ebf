"""Divergence between the logits of two heads, a chunk of tokens at a time.

A chunk costs two products for the logits of both sides, row work in place in cache-sized blocks that turns the
student's logits into their gradient, and one product that pulls it back to the hidden states. Constant factors
(logit_scale, the temperature, a softcap's divisor) are put into hidden states before and after the products, where they
cost [n, d].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.composed.chunks import (
    block_size,
    chunk_size,
    head_logits,
    kept_tokens,
    pull_back,
    token_chunks,
)
from softprompt_kernels.kernels.composed.rows import SCRATCH_BUFFERS, divergence_
from softprompt_kernels.kernels.loss_problem import Head, HeadGradients, HeadNeeds, HeadProblem


def unsupported(problem: HeadProblem) -> str | None:
    """It skips rows by looking at the weights, which would stop another device."""
    device = problem.student.device
    return None if device.type == "cpu" else f"student_hidden is on {device}, and it serves the CPU"


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    loss = torch.zeros(problem.student.shape[0], dtype=problem.compute_dtype)
    gradient = torch.zeros(problem.student.shape, dtype=loss.dtype) if need_gradient else None
    for chunk in _chunks(problem):
        loss[chunk.tokens] = chunk.loss
        if gradient is not None:
            gradient[chunk.tokens] = pull_back(chunk.by_logits, problem.head.weight).mul_(_factor(problem))
    return loss, gradient


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Σ_n row_scale[n] · loss[n], derived by hidden states, weight and bias."""
    head, dtype = problem.head, problem.compute_dtype
    hidden = torch.zeros(problem.student.shape, dtype=dtype)
    weight = torch.zeros(head.weight.shape if needs.weight else 0, dtype=dtype)
    bias = torch.zeros(head.weight.shape[:1], dtype=dtype)
    for chunk in _chunks(problem):
        scale = row_scale[chunk.tokens, None].to(dtype) * _factor(problem)
        if needs.hidden:
            hidden[chunk.tokens] = pull_back(chunk.by_logits, head.weight).mul_(scale)
        if needs.weight:
            weight.addmm_(chunk.by_logits.mT, problem.student[chunk.tokens].to(dtype) * scale)
        if needs.bias:
            bias.addmv_(chunk.by_logits.mT, scale.squeeze(1))
    return HeadGradients(
        hidden.to(problem.student.dtype) if needs.hidden else None,
        weight.to(head.weight.dtype) if needs.weight else None,
        bias.to(head.bias.dtype) if needs.bias and head.bias is not None else None,
    )


@dataclass(frozen=True)
class _Chunk:
    tokens: slice | Tensor
    loss: Tensor  # [n]
    by_logits: Tensor  # [n, V] ∂ loss / ∂ (W h + bias), up to the constant `_factor`; overwritten by the next chunk


def _factor(problem: HeadProblem) -> float:
    """T² from the loss, logit_scale / T from the logits."""
    return problem.head.logit_scale * problem.divergence.temperature


def _chunks(problem: HeadProblem) -> Iterator[_Chunk]:
    divergence, dtype = problem.divergence, problem.compute_dtype
    tokens, vocab = problem.student.shape[0], problem.head.weight.shape[0]
    size = chunk_size(tokens, problem.chunk_tokens, 2, vocab, dtype)
    block = block_size(vocab)
    logits = torch.empty(2, size, vocab, dtype=dtype)
    capped = problem.head.softcap is not None
    scratch = torch.empty(SCRATCH_BUFFERS + capped, min(size, block), vocab, dtype=dtype)
    for rows in token_chunks(tokens, kept_tokens(problem.weights), size):
        count = problem.student[rows].shape[0]
        student, teacher = logits[:, :count]
        _logits(student, problem.student[rows], problem.head, divergence.temperature)
        _logits(teacher, problem.teacher[rows], problem.teacher_head, divergence.temperature)
        losses = [
            _rows_(problem, student[start : start + block], teacher[start : start + block], scratch)
            for start in range(0, count, block)
        ]
        yield _Chunk(rows, torch.cat(losses).mul_(divergence.temperature**2), student)


def _logits(out: Tensor, hidden: Tensor, head: Head, temperature: float) -> None:
    """W h + bias [n, V], times logit_scale over the softcap if there is one, else over the temperature."""
    scale = head.logit_scale / (head.softcap or temperature)
    hidden = hidden.to(out.dtype)
    bias = None if head.bias is None else head.bias.to(out.dtype) * scale
    head_logits(out, hidden if scale == 1 else hidden * scale, head.weight, bias)


def _rows_(problem: HeadProblem, student: Tensor, teacher: Tensor, scratch: Tensor) -> Tensor:
    """Loss of a block of rows; leaves ∂ loss / ∂ (W h + bias) in `student`."""
    divergence, softcap = problem.divergence, problem.head.softcap
    difference, other, *slope = scratch[:, : student.shape[0]]
    if softcap is not None:
        student.tanh_()
        torch.mul(student, student, out=slope[0]).neg_().add_(1)
        student.mul_(softcap / divergence.temperature)
        teacher.tanh_().mul_(softcap / divergence.temperature)
    loss = divergence_(student, teacher, divergence, (difference, other))
    if softcap is not None:
        student.mul_(slope[0])
    return loss
