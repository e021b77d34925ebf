"""Divergence between the logits of two heads, one chunk of tokens at a time.

A chunk costs two GEMMs for the logits of student and teacher, a row kernel that turns the student's logits into their
gradient in place, and one GEMM that pulls this gradient back to the hidden states. It serves every divergence and every
logit, and can also give the gradient of the weight. Where memory holds the logits of only a few tokens, the GEMMs spend
their time on reading the weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.chunks import chunk_size, pull_back, token_chunks, weight_parts
from softprompt_kernels.kernels.host.gemm import Gemm
from softprompt_kernels.kernels.host.head_logits import ScaledHidden, activations, gradient_factor, weights_of
from softprompt_kernels.kernels.host.rows import HostKernels
from softprompt_kernels.kernels.problems.loss import HeadGradients, HeadNeeds, HeadProblem


def tokens_at_once(problem: HeadProblem, tokens: int, gemm: Gemm) -> int:
    """Tokens per chunk, of `tokens` in all."""
    vocab = problem.head.weight.shape[0]
    copied = min(vocab, gemm.max_columns or vocab) if gemm.copies_result else 0
    elements = 2 * (vocab + copied) + problem.student.shape[1] + problem.teacher.shape[1]
    return chunk_size(tokens, problem.chunk_tokens, elements, weights_of(problem), problem.compute_dtype, gemm)


def forward(
    problem: HeadProblem, kept: Tensor | None, loss: Tensor, gradient: Tensor | None, kernels: HostKernels
) -> None:
    """Writes the loss [N] and ∂ loss[n] / ∂ student[n] [N, d] of the kept tokens (None: of all)."""
    for chunk in _chunks(problem, kept, gradient is not None, kernels):
        loss[chunk.tokens] = chunk.loss
        if gradient is not None:
            by_hidden = pull_back(chunk.by_logits, problem.head.weight, kernels.gemm)
            gradient[chunk.tokens] = by_hidden.mul_(gradient_factor(problem))


def backward(
    problem: HeadProblem, kept: Tensor | None, row_scale: Tensor, needs: HeadNeeds, kernels: HostKernels
) -> HeadGradients:
    """Gradients of Σ row_scale[n] · loss[n] over the kept tokens, by hidden states, weight and bias."""
    head, dtype = problem.head, problem.compute_dtype
    hidden = torch.zeros(problem.student.shape if needs.hidden else 0, dtype=dtype)
    weight = torch.zeros(head.weight.shape if needs.weight else 0, dtype=dtype)
    bias = torch.zeros(head.weight.shape[:1] if needs.bias else 0, dtype=dtype)
    for chunk in _chunks(problem, kept, True, kernels):
        scale = row_scale[chunk.tokens, None].to(dtype) * gradient_factor(problem)
        if needs.hidden:
            hidden[chunk.tokens] = pull_back(chunk.by_logits, head.weight, kernels.gemm).mul_(scale)
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
    by_logits: Tensor  # [n, V] ∂ loss / ∂ (W h + bias), up to `gradient_factor`; the next chunk overwrites it


def _chunks(problem: HeadProblem, kept: Tensor | None, need_gradient: bool, kernels: HostKernels) -> Iterator[_Chunk]:
    dtype, gemm = problem.compute_dtype, kernels.gemm
    tokens, vocab = problem.student.shape[0], problem.head.weight.shape[0]
    size = tokens_at_once(problem, tokens if kept is None else kept.shape[0], gemm)
    workspace = kernels.allocate(2 * size, vocab, dtype)
    student_activation, teacher_activation = activations(problem)
    for rows in token_chunks(tokens, kept, size):
        hidden = ScaledHidden(problem, rows)
        logits = workspace[: 2 * hidden.count]
        for columns, weights in weight_parts(weights_of(problem), dtype, gemm, gemm.max_columns):
            hidden.multiply(logits[:, columns], weights, gemm)
        student, teacher = logits.chunk(2)
        loss = kernels.divergence(
            student, teacher, student_activation, teacher_activation, problem.divergence, need_gradient
        )
        yield _Chunk(rows, loss.mul_(problem.divergence.temperature**2), student)
