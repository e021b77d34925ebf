"""Divergence between the logits of two heads, a chunk of tokens at a time.

A chunk costs two products for the logits of both sides, row work in place that turns the student's logits into their
gradient, and one product that pulls it back to the hidden states. It takes any divergence, any logits, and a gradient
for the weight too. Where the logits of few tokens fit the memory, the products spend their time on the weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.chunks import chunk_size, pull_back, token_chunks, weight_parts
from softprompt_kernels.kernels.host.gemm import Products
from softprompt_kernels.kernels.host.head_logits import (
    Activation,
    ScaledHidden,
    activations,
    gradient_factor,
    weights_of,
)
from softprompt_kernels.kernels.problems.loss import Divergence, HeadGradients, HeadNeeds, HeadProblem

Allocate = Callable[[int, int, torch.dtype], Tensor]  # an uninitialised matrix, large and soon given back


class RowWork(Protocol):
    """Loss [n] of products [n, V], without the factor T².

    With `need_gradient` it leaves the gradient by the student's products in `student`, a softcap's factor left out (but
    not its tanh'). It overwrites both in any case.
    """

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_activation: Activation,
        teacher_activation: Activation,
        divergence: Divergence,
        need_gradient: bool,
    ) -> Tensor: ...


@dataclass(frozen=True)
class ChunkWork:
    """What a backend supplies."""

    rows: RowWork
    allocate: Allocate
    products: Products


def tokens_at_once(problem: HeadProblem, tokens: int, products: Products) -> int:
    """How many of `tokens` make a chunk."""
    vocab = problem.head.weight.shape[0]
    copied = min(vocab, products.columns or vocab) if products.copies_result else 0
    elements = 2 * (vocab + copied) + problem.student.shape[1] + problem.teacher.shape[1]
    return chunk_size(tokens, problem.chunk_tokens, elements, weights_of(problem), problem.compute_dtype, products)


def forward(problem: HeadProblem, kept: Tensor | None, loss: Tensor, gradient: Tensor | None, work: ChunkWork) -> None:
    """Fills in the loss [N] and ∂ loss[n] / ∂ student[n] [N, d] of the kept tokens; None: of all."""
    for chunk in _chunks(problem, kept, gradient is not None, work):
        loss[chunk.tokens] = chunk.loss
        if gradient is not None:
            by_hidden = pull_back(chunk.by_logits, problem.head.weight, work.products)
            gradient[chunk.tokens] = by_hidden.mul_(gradient_factor(problem))


def backward(
    problem: HeadProblem, kept: Tensor | None, row_scale: Tensor, needs: HeadNeeds, work: ChunkWork
) -> HeadGradients:
    """Σ row_scale[n] · loss[n] of the kept tokens, derived by hidden states, weight and bias."""
    head, dtype = problem.head, problem.compute_dtype
    hidden = torch.zeros(problem.student.shape if needs.hidden else 0, dtype=dtype)
    weight = torch.zeros(head.weight.shape if needs.weight else 0, dtype=dtype)
    bias = torch.zeros(head.weight.shape[:1] if needs.bias else 0, dtype=dtype)
    for chunk in _chunks(problem, kept, True, work):
        scale = row_scale[chunk.tokens, None].to(dtype) * gradient_factor(problem)
        if needs.hidden:
            hidden[chunk.tokens] = pull_back(chunk.by_logits, head.weight, work.products).mul_(scale)
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
    by_logits: Tensor  # [n, V] ∂ loss / ∂ (W h + bias), up to `gradient_factor`; overwritten by the next chunk


def _chunks(problem: HeadProblem, kept: Tensor | None, need_gradient: bool, work: ChunkWork) -> Iterator[_Chunk]:
    dtype, products = problem.compute_dtype, work.products
    tokens, vocab = problem.student.shape[0], problem.head.weight.shape[0]
    size = tokens_at_once(problem, tokens if kept is None else kept.shape[0], products)
    buffer = work.allocate(2 * size, vocab, dtype)
    student_activation, teacher_activation = activations(problem)
    for rows in token_chunks(tokens, kept, size):
        hidden = ScaledHidden(problem, rows)
        logits = buffer[: 2 * hidden.count]
        for columns, weights in weight_parts(weights_of(problem), dtype, products, products.columns):
            hidden.multiply(logits[:, columns], weights, products)
        student, teacher = logits.chunk(2)
        loss = work.rows(student, teacher, student_activation, teacher_activation, problem.divergence, need_gradient)
        yield _Chunk(rows, loss.mul_(problem.divergence.temperature**2), student)
