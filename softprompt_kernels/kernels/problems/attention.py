"""The problem that every attention kernel is given. `ops.prompt_attention` has checked its tensors.

Notation of all attention kernels:

    B  batch (1 in the packed form)         S    sequences: cu_seqlens has S + 1 entries; B in the padded form
    M  queries per sequence                 N    own keys per sequence
    R  prompts in the bank                  P    keys per prompt, padding included
    Hq query heads, Hkv key heads           g    Hq / Hkv
    D  head size of queries and keys        Dv   head size of values

Positions: prompt key p has position p, own key j has `len + j`, query i has `len + (N - M) + i`, where `len` is the
length of the prompt that the sequence sees. In the packed form i and j count from the start of their sequence.

A kernel module has

    forward(problem) -> (out [B, Hq, M, Dv], lse [B, Hq, M])
    backward(problem, out, lse, grad_out, grad_lse, needs) -> Gradients

`out` has query's dtype, `lse` is fp32 (float64 for float64 inputs). In memory, out and the gradients of query, key and
value are laid out as [batch, tokens, heads, size]: that is what the projections before and after attention use.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of one attention over [prompt ; own tokens]."""

    query: Tensor  # [B, Hq, M, D]
    key: Tensor  # [B, Hkv, N, D]
    value: Tensor  # [B, Hkv, N, Dv]
    prompt_key: Tensor  # [R, Hkv, P, D]
    prompt_value: Tensor  # [R, Hkv, P, Dv]
    prompt_index: Tensor | None  # [S] int64, None: prompt 0 for all if R = 1, else prompt s for sequence s
    prompt_lengths: Tensor | None  # [R] int64, None: all P
    key_lengths: Tensor | None  # [B] int64, None: all N
    cu_seqlens: Tensor | None  # [S + 1] int64, packed form
    sinks: Tensor | None  # [Hq]
    causal: bool
    window: int | None
    softcap: float | None
    scale: float

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, fp32 for all others."""
        return accumulate_dtype(self.query.dtype)


class Needs(NamedTuple):
    """Which gradients the backward has to compute."""

    query: bool
    key: bool
    value: bool
    prompt_key: bool
    prompt_value: bool
    sinks: bool


class Gradients(NamedTuple):
    """The gradients that `Needs` asked for, None for the others."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    prompt_key: Tensor | None
    prompt_value: Tensor | None
    sinks: Tensor | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators: float64 for float64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(problem: AttentionProblem) -> Tensor:
    """Uninitialised out [B, Hq, M, Dv], in memory [B, M, Hq, Dv]."""
    batch, heads, queries, _ = problem.query.shape
    return empty_token_major(problem.query, batch, heads, queries, problem.value.shape[3])


def empty_token_major(like: Tensor, batch: int, heads: int, tokens: int, size: int) -> Tensor:
    """Uninitialised [batch, heads, tokens, size], in memory [batch, tokens, heads, size]."""
    return like.new_empty_strided((batch, heads, tokens, size), _token_major_strides(heads, tokens, size))


def token_major(tensor: Tensor) -> Tensor:
    """The same [batch, heads, tokens, size], in memory [batch, tokens, heads, size]; a copy only where needed."""
    if tensor.stride() == _token_major_strides(*tensor.shape[1:]):
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _token_major_strides(heads: int, tokens: int, size: int) -> tuple[int, int, int, int]:
    return tokens * heads * size, size, heads * size, 1
