"""Forward or reverse KL between the logits of two heads, in one sweep over tiles of the vocabulary.

As in flash attention, all tokens of a chunk see a tile while it is in the cache, and logits are not kept. Only in the
end are the normalisers known, so the gradient comes from two sums [n, d]. With p the side that weighs (forward: the
teacher, reverse: the student) and q the other, m the largest z_p so far and c a number near lse(z_q) − lse(z_p),

    e = exp(z_p − m),   D = z_q − z_p − c,   S = Σ e,   R = Σ e e^D,   C = Σ e (e^D − 1),   X = Σ e (e^D − 1 − D),
    Y = Σ e D,          T = Σ e W,           U = Σ e (e^D − 1) W  forward,   Σ e D W  reverse

    KL(p‖q) = X/S + log1p(C/S) − C/S                           (or log(R/S) − Y/S, where C/S is not small)
    ∂ KL / ∂ (W h) · W = (U − (C/S) T) / R  forward,   −(U − (Y/S) T) / S  reverse

which keep their relative accuracy as q goes to p. How they follow m and c is told in `csrc/cpu/losses/kl_tile.cpp`.

A tile costs two products for the logits and two for the sums, which is one more than where logits are kept, over far
more tokens at a time. The sums of some rows mean nothing, as of those with −inf logits on one side: they are left out.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.chunked_logits import Allocate
from softprompt_kernels.kernels.host.chunks import chunk_size, token_chunks, weight_parts
from softprompt_kernels.kernels.host.gemm import Products
from softprompt_kernels.kernels.host.head_logits import (
    Activation,
    ScaledHidden,
    activations,
    gradient_factor,
    weights_of,
)
from softprompt_kernels.kernels.problems.loss import FORWARD, Divergence, HeadProblem

_TILE = 2048  # words; 1024 takes 3 % longer, and 4096 twice the memory
_SCALARS = 8  # m, c, S, R, C, X, Y, and 1 for a row that is left out


@dataclass(frozen=True)
class State:
    """Of the n tokens of a chunk, after some tiles."""

    scalars: Tensor  # [n, 8] float64, 0 before the first tile
    sums: Tensor | None  # [2 n, d] U over T


class TileWork(Protocol):
    """Adds products [n, columns] of a tile to the state, but for U and T, which are only rescaled.

    If the state has these, `student` becomes what weighs W in U, and `teacher` in T, both with a softcap's tanh'.
    """

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_activation: Activation,
        teacher_activation: Activation,
        divergence: Divergence,
        state: State,
    ) -> None: ...


@dataclass(frozen=True)
class SweepWork:
    """What a backend supplies."""

    tile: TileWork
    allocate: Allocate
    products: Products


def tokens_at_once(problem: HeadProblem, tokens: int, products: Products) -> int:
    """How many of `tokens` make a chunk."""
    tile = min(_TILE, problem.head.weight.shape[0]) * (2 if products.copies_result else 1)
    elements = 2 * tile + 2 * _SCALARS + 3 * problem.student.shape[1] + problem.teacher.shape[1]
    return chunk_size(tokens, problem.chunk_tokens, elements, weights_of(problem), problem.compute_dtype, products)


def forward(
    problem: HeadProblem, kept: Tensor | None, loss: Tensor, gradient: Tensor | None, work: SweepWork
) -> Tensor:
    """Fills in the loss [N] and ∂ loss[n] / ∂ student[n] [N, d] of the kept tokens (None: of all) but those left out.

    Returns the tokens that are.
    """
    divergence, dtype, products = problem.divergence, problem.compute_dtype, work.products
    (tokens, width), vocab = problem.student.shape, problem.head.weight.shape[0]
    size = tokens_at_once(problem, tokens if kept is None else kept.shape[0], products)
    buffer = work.allocate(2 * size, min(_TILE, vocab), dtype).flatten()
    student_activation, teacher_activation = activations(problem)
    left_out = []
    for rows in token_chunks(tokens, kept, size):
        hidden = ScaledHidden(problem, rows)
        state = State(
            torch.zeros(hidden.count, _SCALARS, dtype=torch.float64),
            None if gradient is None else torch.zeros(2 * hidden.count, width, dtype=dtype),
        )
        for columns, weights in weight_parts(weights_of(problem), dtype, products, _TILE):
            shape = 2 * hidden.count, weights[0].shape[0]
            logits = buffer[: shape[0] * shape[1]].view(shape)
            hidden.multiply(logits, weights, products)
            student, teacher = logits.chunk(2)
            work.tile(
                student, teacher, student_activation.part(columns), teacher_activation.part(columns), divergence, state
            )
            if state.sums is not None:
                products.multiply(state.sums, logits, weights[0], True)
        loss[rows] = _loss(state.scalars).mul_(divergence.temperature**2).to(dtype)
        if gradient is not None and state.sums is not None:
            gradient[rows] = _gradient_(state.sums, state.scalars, divergence.kind).mul_(gradient_factor(problem))
        missing = _left_out(state.scalars)
        left_out.append((torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows)[missing])
    return torch.cat(left_out) if left_out else torch.empty(0, dtype=torch.int64)


def _loss(scalars: Tensor) -> Tensor:
    """[n] in float64, anything for rows that are left out."""
    _, _, total, other, change, excess, difference, _ = scalars.unbind(1)
    change = change / total
    centred = change.abs() < 0.5
    log_ratio = torch.where(centred, torch.log1p(change), torch.log(other / total))
    loss = torch.where(centred, excess / total + (log_ratio - change), log_ratio - difference / total)
    return loss.clamp_(min=0)  # rounding can say < 0


def _gradient_(sums: Tensor, scalars: Tensor, kind: str) -> Tensor:
    """[n, d] in place of U, anything for rows that are left out."""
    _, _, total, other, change, _, difference, _ = scalars.unbind(1)
    share, scale = (change / total, 1 / other) if kind == FORWARD else (difference / total, -1 / total)
    weighted, plain = sums.chunk(2)
    return weighted.addcmul_(plain, share[:, None].to(sums.dtype), value=-1).mul_(scale[:, None].to(sums.dtype))


def _left_out(scalars: Tensor) -> Tensor:
    """[n]; also those that no tile had a word for, and those whose sums left the range of their numbers."""
    return (scalars[:, -1] != 0) | (scalars[:, 2] == 0) | ~scalars.isfinite().all(1)
