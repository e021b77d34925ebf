"""Divergence between the logits of two heads, a chunk of tokens at a time: what backends with row work in place share.

A chunk costs two products for the logits of both sides, row work in place that turns the student's logits into their
gradient, and one product that pulls it back to the hidden states. Constant factors (logit_scale, the temperature, a
softcap's divisor) are put into hidden states before and after the products, where they cost [n, d].

A backend supplies the row work and the memory for the logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from softprompt_kernels.kernels.chunks import chunk_size, head_logits, kept_tokens, pull_back, token_chunks
from softprompt_kernels.kernels.loss_problem import Divergence, Head, HeadGradients, HeadNeeds, HeadProblem


@dataclass(frozen=True)
class Activation:
    """What makes logits over T of products [n, V]: plus `bias`, then softcap · tanh where there is a softcap."""

    bias: Tensor | None  # [V]
    softcap: float | None


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
class Backend:
    """What a backend supplies."""

    row_work: RowWork
    allocate: Callable[[int, int, torch.dtype], Tensor]  # an uninitialised matrix, large and soon given back


def forward(problem: HeadProblem, need_gradient: bool, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    loss = torch.zeros(problem.student.shape[0], dtype=problem.compute_dtype)
    gradient = torch.zeros(problem.student.shape, dtype=loss.dtype) if need_gradient else None
    for chunk in _chunks(problem, need_gradient, backend):
        loss[chunk.tokens] = chunk.loss
        if gradient is not None:
            gradient[chunk.tokens] = pull_back(chunk.by_logits, problem.head.weight).mul_(_factor(problem))
    return loss, gradient


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds, backend: Backend) -> HeadGradients:
    """Σ_n row_scale[n] · loss[n], derived by hidden states, weight and bias."""
    head, dtype = problem.head, problem.compute_dtype
    hidden = torch.zeros(problem.student.shape if needs.hidden else 0, dtype=dtype)
    weight = torch.zeros(head.weight.shape if needs.weight else 0, dtype=dtype)
    bias = torch.zeros(head.weight.shape[:1] if needs.bias else 0, dtype=dtype)
    for chunk in _chunks(problem, True, backend):
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


def _chunks(problem: HeadProblem, need_gradient: bool, backend: Backend) -> Iterator[_Chunk]:
    divergence, dtype = problem.divergence, problem.compute_dtype
    temperature, heads = divergence.temperature, (problem.head, problem.teacher_head)
    tokens, vocab = problem.student.shape[0], problem.head.weight.shape[0]
    elements = 2 * vocab + problem.student.shape[1] + problem.teacher.shape[1]
    size = chunk_size(tokens, problem.chunk_tokens, elements, problem.head.weight, dtype)
    logits = backend.allocate(2 * size, vocab, dtype)
    activations = [_activation(head, temperature, dtype) for head in heads]
    for rows in token_chunks(tokens, kept_tokens(problem.weights), size):
        hidden = [
            _scaled(h[rows].to(dtype), _scale(head, temperature))
            for h, head in zip((problem.student, problem.teacher), heads, strict=True)
        ]
        count = hidden[0].shape[0]
        student, teacher = logits[:count], logits[count : 2 * count]
        if problem.teacher_head is problem.head:  # one product for both sides reads the weight once
            head_logits(logits[: 2 * count], torch.cat(hidden), problem.head.weight)
        else:
            head_logits(student, hidden[0], problem.head.weight)
            head_logits(teacher, hidden[1], problem.teacher_head.weight)
        loss = backend.row_work(student, teacher, activations[0], activations[1], divergence, need_gradient)
        yield _Chunk(rows, loss.mul_(temperature**2), student)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def _scale(head: Head, temperature: float) -> float:
    """Of the products: logit_scale over the softcap if there is one, else over the temperature."""
    return head.logit_scale / (head.softcap or temperature)


def _activation(head: Head, temperature: float, dtype: torch.dtype) -> Activation:
    bias = None if head.bias is None else (head.bias.to(dtype) * _scale(head, temperature)).contiguous()
    return Activation(bias, None if head.softcap is None else head.softcap / temperature)
