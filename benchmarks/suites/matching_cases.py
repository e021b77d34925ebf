"""Cases of the suite `matching`: a step of refinement, from keys and values to their gradients, without the optimiser.

All layers at once: the error of the prompt's attention output on some rows, and its gradient by K' and V'.

Useful FLOP: 12·D for each pair of a query and a key: scores and output, then backward the scores again and the
gradients of softmax, values and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.case import Implementation, Rule
from softprompt_kernels.bench.peers.compiled import compile_for_one_size
from softprompt_kernels.bench.rounds import BASELINE, OURS, Results
from softprompt_kernels.compress.matching.refine import RefineRows, match_error
from softprompt_kernels.models.tap import ScoreFunction

SPEEDUP = 3.0  # required


class Inputs(NamedTuple):
    """Rows of L layers, and their prompts `[L, Hkv, k, D]`."""

    rows: RefineRows
    key: Tensor
    value: Tensor


Error = Callable[[Inputs], Tensor]  # the sum over layers and heads, a scalar


@dataclass(frozen=True)
class MatchingCase:
    """L layers, Hq and Hkv heads of size D, n rows a step, k prompt tokens, fp32."""

    layers: int
    heads: int
    kv_heads: int
    rows: int
    tokens: int
    size: int
    tolerance: float = 1e-4

    @property
    def name(self) -> str:
        return f"L{self.layers} H{self.heads}/{self.kv_heads} n{self.rows} k{self.tokens} D{self.size}"

    @property
    def flop(self) -> float:
        return 12.0 * self.layers * self.heads * self.rows * self.tokens * self.size

    @property
    def result_bytes(self) -> int:
        return 4 * 2 * self.layers * self.kv_heads * self.tokens * self.size

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def tensor(*shape: int) -> Tensor:
            return torch.randn(self.layers, *shape, generator=generator)

        query, rest_out, error = (tensor(self.heads, self.rows, self.size) for _ in range(3))
        size = error.square().sum(-1).mean(-1)
        # About half of the softmax goes to the prompt.
        rest_lse = tensor(self.heads, self.rows) + torch.tensor(self.tokens).log() + 0.5
        rows = RefineRows(query, rest_out, error, rest_lse, size, ScoreFunction(self.size**-0.5))
        key, value = (tensor(self.kv_heads, self.tokens, self.size).requires_grad_() for _ in range(2))
        return Inputs(rows, key, value)

    def implementations(self) -> Mapping[str, tuple[str, Implementation]]:
        return {
            OURS: (OURS, _with_gradient(ours)),
            "PyTorch, grouped heads": (BASELINE, _with_gradient(grouped)),
            "PyTorch, repeated heads": (BASELINE, _with_gradient(repeated)),
        }

    def compiled(self) -> Mapping[str, tuple[str, Implementation]]:
        def implementation(inputs: Inputs) -> Callable[[], Results]:
            return _with_gradient(compile_for_one_size(grouped))(inputs)

        return {"PyTorch, grouped heads, compiled": (BASELINE, implementation)}

    def rules(self) -> list[Rule]:
        return [("speedup over plain PyTorch", SPEEDUP)]

    def tiny(self) -> MatchingCase:
        return replace(self, layers=2, rows=6, tokens=4, size=16)


def ours(inputs: Inputs) -> Tensor:
    """`match_error`: one `prompt_attention` for all layers, and the gradient of its lse."""
    return match_error(*inputs).sum()


def grouped(inputs: Inputs) -> Tensor:
    """Batched GEMMs, with the query heads of a key head as rows of one matrix."""
    rows, key, value = inputs
    layers, heads, count, size = rows.query.shape
    query = rows.query.reshape(layers, key.shape[1], -1, size)
    scores = query @ key.mT * rows.scores.scale
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ value
    return _error(rows, out.view(layers, heads, count, -1), lse.view(layers, heads, count))


def repeated(inputs: Inputs) -> Tensor:
    """Batched GEMMs, with the key heads repeated for their query heads."""
    rows, key, value = inputs
    key, value = (t.repeat_interleave(rows.query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = rows.query @ key.mT * rows.scores.scale
    return _error(rows, scores.softmax(-1) @ value, scores.logsumexp(-1))


def _error(rows: RefineRows, out: Tensor, lse: Tensor) -> Tensor:
    share = torch.sigmoid(lse - rows.rest_lse)[..., None]
    difference = rows.rest_error + share * (out - rows.rest_out)
    return (difference.square().sum((2, 3)) / (rows.size * rows.count)).sum()


def _with_gradient(error: Error) -> Implementation:
    def implementation(inputs: Inputs) -> Callable[[], Results]:
        return lambda: torch.autograd.grad(error(inputs), (inputs.key, inputs.value))

    return implementation


CASES = [
    MatchingCase(30, 9, 3, 512, 86, 64),  # the demo
    MatchingCase(30, 9, 3, 512, 256, 64),
    MatchingCase(8, 32, 8, 512, 128, 128),  # a quarter of Llama 3.1 8B
]
