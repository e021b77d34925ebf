"""Divergence between the logits of two heads, from hidden states: chooses the driver for each token.

    chunked_logits.py         stores the logits of a chunk of tokens; serves every divergence
    streamed_vocabulary.py    stores no logits; serves forward and reverse KL, with the other as fallback for some rows

Only the GEMMs matter for the time. A GEMM of n rows takes as long as n + k rows would if reading and packing the weight
were free, where k is `Gemm.weight_cost`. The unit is a GEMM of the head's size with very many rows. A token costs

    chunks of n tokens, stored logits          2 + k/n for the logits, and 1 + k/n for the gradient
    chunks of n tokens, streamed vocabulary    2 + k/n for the logits, and 2 + k/n for the gradient

and n is much larger with a streamed vocabulary.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.host import chunked_logits, streamed_vocabulary
from softprompt_kernels.kernels.host.chunks import kept_tokens
from softprompt_kernels.kernels.host.gemm import Gemm
from softprompt_kernels.kernels.host.rows import HostKernels
from softprompt_kernels.kernels.problems.loss import (
    FORWARD,
    JSD,
    REVERSE,
    HeadGradients,
    HeadNeeds,
    HeadProblem,
    unknown_divergence,
)


def forward(problem: HeadProblem, need_gradient: bool, kernels: HostKernels) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    loss = torch.zeros(problem.student.shape[0], dtype=problem.compute_dtype)
    gradient = torch.zeros(problem.student.shape, dtype=loss.dtype) if need_gradient else None
    kept = kept_tokens(problem.weights)
    if kernels.divergence_tile is not None and _streaming_is_faster(problem, kept, need_gradient, kernels.gemm):
        kept = streamed_vocabulary.forward(problem, kept, loss, gradient, kernels)
    chunked_logits.forward(problem, kept, loss, gradient, kernels)
    return loss, gradient


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds, kernels: HostKernels) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n], by hidden states, weight and bias."""
    return chunked_logits.backward(problem, kept_tokens(problem.weights), row_scale, needs, kernels)


def _streaming_is_faster(problem: HeadProblem, kept: Tensor | None, need_gradient: bool, gemm: Gemm) -> bool:
    kind = problem.divergence.kind
    if kind not in (FORWARD, REVERSE, JSD):
        raise unknown_divergence(kind)
    tokens = problem.student.shape[0] if kept is None else kept.shape[0]
    if kind == JSD or tokens == 0:
        return False
    weight = (2 if need_gradient else 1) * gemm.weight_cost
    chunked = (3 if need_gradient else 2) + weight / chunked_logits.tokens_at_once(problem, tokens, gemm)
    streamed = (4 if need_gradient else 2) + weight / streamed_vocabulary.tokens_at_once(problem, tokens, gemm)
    return streamed < chunked
