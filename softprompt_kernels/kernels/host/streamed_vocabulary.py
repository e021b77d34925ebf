"""Forward or reverse KL between the logits of two heads, in one pass over tiles of the vocabulary.

As in flash attention, all tokens of a chunk use a tile while it is in the cache, and no logits are stored. The
normalisers are known only after the last tile, so the gradient is computed from two sums [n, d]. Let p be the
distribution that weights the terms (forward: the teacher's, reverse: the student's) and q the other one, m the largest
z_p so far, and c a number near lse(z_q) − lse(z_p). Then

    e = exp(z_p − m),   D = z_q − z_p − c,   S = Σ e,   R = Σ e e^D,   C = Σ e (e^D − 1),   X = Σ e (e^D − 1 − D),
    Y = Σ e D,          T = Σ e W,           U = Σ e (e^D − 1) W  forward,   Σ e D W  reverse

    KL(p‖q) = X/S + log1p(C/S) − C/S                           (or log(R/S) − Y/S, where C/S is not small)
    ∂ KL / ∂ (W h) · W = (U − (C/S) T) / R  forward,   −(U − (Y/S) T) / S  reverse

These keep their relative accuracy as q goes to p. `csrc/cpu/losses/kl_tile.cpp` explains how the sums change with m
and c.

A tile costs two GEMMs for the logits and two for the sums. That is one GEMM more than with stored logits, but a chunk
has far more tokens. Some rows cannot be computed from the sums, for example those with −inf logits in only one of
student and teacher. The fallback for these rows is `chunked_logits.py`.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.host.chunks import chunk_size, token_chunks, weight_parts
from softprompt_kernels.kernels.host.gemm import Gemm
from softprompt_kernels.kernels.host.head_logits import ScaledHidden, activations, gradient_factor, weights_of
from softprompt_kernels.kernels.host.rows import HostKernels, KlColumn, KlTileState
from softprompt_kernels.kernels.problems.loss import FORWARD, REVERSE, HeadProblem, unknown_divergence

_TILE = 2048  # vocabulary entries; 1024 takes 3 % longer, and 4096 takes twice the memory


def tokens_at_once(problem: HeadProblem, tokens: int, gemm: Gemm) -> int:
    """Tokens per chunk, of `tokens` in all."""
    tile = min(_TILE, problem.head.weight.shape[0]) * (2 if gemm.copies_result else 1)
    elements = 2 * tile + 2 * len(KlColumn) + 3 * problem.student.shape[1] + problem.teacher.shape[1]
    return chunk_size(tokens, problem.chunk_tokens, elements, weights_of(problem), problem.compute_dtype, gemm)


def forward(
    problem: HeadProblem, kept: Tensor | None, loss: Tensor, gradient: Tensor | None, kernels: HostKernels
) -> Tensor:
    """Writes the loss [N] and ∂ loss[n] / ∂ student[n] [N, d] of the kept tokens (None: of all).

    Returns the indices of the tokens that need the fallback. What is written for them means nothing.
    """
    add_tile = kernels.divergence_tile
    assert add_tile is not None
    divergence, dtype, gemm = problem.divergence, problem.compute_dtype, kernels.gemm
    (tokens, width), vocab = problem.student.shape, problem.head.weight.shape[0]
    size = tokens_at_once(problem, tokens if kept is None else kept.shape[0], gemm)
    workspace = kernels.allocate(2 * size, min(_TILE, vocab), dtype).flatten()
    student_activation, teacher_activation = activations(problem)
    fallback = []
    for rows in token_chunks(tokens, kept, size):
        hidden = ScaledHidden(problem, rows)
        state = KlTileState(
            torch.zeros(hidden.count, len(KlColumn), dtype=torch.float64),
            None if gradient is None else torch.zeros(2 * hidden.count, width, dtype=dtype),
        )
        for columns, weights in weight_parts(weights_of(problem), dtype, gemm, _TILE):
            shape = 2 * hidden.count, weights[0].shape[0]
            logits = workspace[: shape[0] * shape[1]].view(shape)
            hidden.multiply(logits, weights, gemm)
            student, teacher = logits.chunk(2)
            add_tile(
                student, teacher, student_activation.part(columns), teacher_activation.part(columns), divergence, state
            )
            if state.sums is not None:
                gemm.multiply(state.sums, logits, weights[0], True)
        loss[rows] = _loss(state.scalars).mul_(divergence.temperature**2).to(dtype)
        if gradient is not None and state.sums is not None:
            gradient[rows] = _gradient_(state.sums, state.scalars, divergence.kind).mul_(gradient_factor(problem))
        indices = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        fallback.append(indices[_needs_fallback(state.scalars)])
    return torch.cat(fallback) if fallback else torch.empty(0, dtype=torch.int64)


def _loss(scalars: Tensor) -> Tensor:
    """KL [n] in float64, without T²; any number for rows that need the fallback."""
    p_sum = scalars[:, KlColumn.P_SUM]
    mean_expm1 = scalars[:, KlColumn.EXPM1_SUM] / p_sum
    is_small = mean_expm1.abs() < 0.5
    log_ratio = torch.where(is_small, torch.log1p(mean_expm1), torch.log(scalars[:, KlColumn.Q_SUM] / p_sum))
    loss = torch.where(
        is_small,
        scalars[:, KlColumn.EXCESS_SUM] / p_sum + (log_ratio - mean_expm1),
        log_ratio - scalars[:, KlColumn.DIFFERENCE_SUM] / p_sum,
    )
    return loss.clamp_(min=0)  # rounding may give a result below 0


def _gradient_(sums: Tensor, scalars: Tensor, kind: str) -> Tensor:
    """∂ KL / ∂ (W h) · W [n, d], in place of U; any number for rows that need the fallback."""
    p_sum = scalars[:, KlColumn.P_SUM]
    if kind == FORWARD:
        share, scale = scalars[:, KlColumn.EXPM1_SUM] / p_sum, 1 / scalars[:, KlColumn.Q_SUM]
    elif kind == REVERSE:
        share, scale = scalars[:, KlColumn.DIFFERENCE_SUM] / p_sum, -1 / p_sum
    else:
        raise unknown_divergence(kind)
    u, t = sums.chunk(2)
    return u.addcmul_(t, share[:, None].to(sums.dtype), value=-1).mul_(scale[:, None].to(sums.dtype))


def _needs_fallback(scalars: Tensor) -> Tensor:
    """[n] bool. Includes rows that got no vocabulary entry from any tile, and rows whose sums overflowed."""
    return (scalars[:, KlColumn.NEEDS_FALLBACK] != 0) | (scalars[:, KlColumn.P_SUM] == 0) | ~scalars.isfinite().all(1)
