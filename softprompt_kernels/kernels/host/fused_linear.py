"""Divergence between the logits of two heads, from hidden states: which of two forms serves which tokens.

`linear_kl_div_chunks.py` keeps the logits of a chunk of tokens, for any divergence; `linear_kl_div_sweep.py` keeps
none, for forward and reverse KL, and leaves some rows to the other. Products are all that counts. One of n rows takes
as long as n + k rows would if reading and packing the weight were free, with `Products.weight_rows` for k. So, in
products of the head's size with rows that are many, a token costs

    chunks of n   2 + k/n for the logits, and 1 + k/n for the gradient
    sweeps of n   2 + k/n for the logits, and 2 + k/n for the gradient

and a sweep has many more tokens at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.host import chunked_logits as chunked
from softprompt_kernels.kernels.host import streamed_vocabulary as swept
from softprompt_kernels.kernels.host.chunked_logits import Allocate, ChunkWork, RowWork
from softprompt_kernels.kernels.host.chunks import kept_tokens
from softprompt_kernels.kernels.host.gemm import Products
from softprompt_kernels.kernels.host.streamed_vocabulary import SweepWork, TileWork
from softprompt_kernels.kernels.problems.loss import JSD, HeadGradients, HeadNeeds, HeadProblem


@dataclass(frozen=True)
class Backend:
    """What a backend supplies."""

    products: Products
    allocate: Allocate
    rows: RowWork
    tile: TileWork | None  # None: it does not sweep

    @property
    def chunks(self) -> ChunkWork:
        """For the form that keeps logits."""
        return ChunkWork(self.rows, self.allocate, self.products)


def forward(problem: HeadProblem, need_gradient: bool, backend: Backend) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed."""
    loss = torch.zeros(problem.student.shape[0], dtype=problem.compute_dtype)
    gradient = torch.zeros(problem.student.shape, dtype=loss.dtype) if need_gradient else None
    kept = kept_tokens(problem.weights)
    if backend.tile is not None and _sweep_is_cheaper(problem, kept, need_gradient, backend.products):
        sweep = SweepWork(backend.tile, backend.allocate, backend.products)
        kept = swept.forward(problem, kept, loss, gradient, sweep)
    chunked.forward(problem, kept, loss, gradient, backend.chunks)
    return loss, gradient


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds, backend: Backend) -> HeadGradients:
    """Σ_n row_scale[n] · loss[n], derived by hidden states, weight and bias."""
    return chunked.backward(problem, kept_tokens(problem.weights), row_scale, needs, backend.chunks)


def _sweep_is_cheaper(problem: HeadProblem, kept: Tensor | None, need_gradient: bool, products: Products) -> bool:
    tokens = problem.student.shape[0] if kept is None else kept.shape[0]
    if problem.divergence.kind == JSD or tokens == 0:
        return False
    weight = (2 if need_gradient else 1) * products.weight_rows
    chunks = (3 if need_gradient else 2) + weight / chunked.tokens_at_once(problem, tokens, products)
    sweeps = (4 if need_gradient else 2) + weight / swept.tokens_at_once(problem, tokens, products)
    return sweeps < chunks
