"""Cases of `prompt_attention`: B sequences of M tokens behind P prompt tokens that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor

from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.testing.case import BACKWARD, BOTH, FORWARD, Case

GRAD_OUT_SEED = 0x6F757431  # none of the small seeds that inputs are made with: it must differ from the query
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class AttentionInputs(NamedTuple):
    """The five tensors of the op. In memory, own tokens lie as a projection leaves them: tokens before heads."""

    query: Tensor  # [B, Hq, M, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, D]
    prompt_key: Tensor  # [1, Hkv, P, D]
    prompt_value: Tensor  # [1, Hkv, P, D]


@dataclass(frozen=True)
class PromptAttentionCase(Case):
    """Causal attention of a batch behind one shared prompt, for example `PromptAttentionCase(8, 14, 2, 256, 128, 64)`.

    FLOP: a query sees P prompt keys, and of its sequence on average (M + 1) / 2 keys, so a head has
    `pairs = B · (M·P + M·(M + 1)/2)`. Forward: 2 GEMMs, 4·D a pair. Backward: 5 GEMMs (the scores again, and the
    gradients of scores, queries, keys and values), 10·D a pair. Hidden pairs do not count.

    Bytes: forward reads the inputs and writes out and lse (fp32). The backward is two kernels at least. One reads the
    inputs, dO, out and lse, and writes dQ and delta = rowsum(dO ∘ out). The other reads the inputs, dO, lse and delta,
    and writes the other four gradients.

    Args:
        batch, heads, kv_heads, queries, prompt, size: B, Hq, Hkv, M = N, P, D.
    """

    op: ClassVar[str] = "prompt_attention"
    letters: ClassVar[tuple[str, ...]] = ("B", "H", "M", "P", "D")
    result_names: ClassVar[tuple[str, ...]] = ("out", "dquery", "dkey", "dvalue", "dprompt_key", "dprompt_value")

    batch: int
    heads: int
    kv_heads: int
    queries: int
    prompt: int
    size: int

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {
            "B": (self.batch,),
            "H": (self.heads, self.kv_heads),
            "M": (self.queries,),
            "P": (self.prompt,),
            "D": (self.size,),
        }

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> AttentionInputs:
        generator = torch.Generator().manual_seed(seed)

        def tensor(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        def projected(heads: int) -> Tensor:
            return tensor(self.batch, self.queries, heads, self.size).transpose(1, 2)

        made = [projected(self.heads), projected(self.kv_heads), projected(self.kv_heads)]
        made += [tensor(1, self.kv_heads, self.prompt, self.size) for _ in range(2)]
        return AttentionInputs(*(one.requires_grad_() for one in made))

    def forward(self, inputs: AttentionInputs, backend: str | None = None) -> Callable[[], Tensor]:
        return cast(Callable[[], Tensor], partial(prompt_attention, *inputs, backend=backend))

    def sources(self, inputs: AttentionInputs) -> tuple[Tensor, ...]:
        return tuple(inputs)

    def grad_out(self, inputs: AttentionInputs) -> Tensor:
        query = inputs.query
        batch, heads, queries, size = query.shape
        generator = torch.Generator().manual_seed(GRAD_OUT_SEED)
        made = torch.randn(batch, queries, heads, size, generator=generator).transpose(1, 2)
        return made.to(query.device, query.dtype)

    def flop(self, pass_: str | None = None) -> float:
        pass_ = self.check_pass(pass_)
        pairs = self.batch * (self.queries * self.prompt + self.queries * (self.queries + 1) // 2)
        return {FORWARD: 4.0, BACKWARD: 10.0, BOTH: 14.0}[pass_] * self.size * self.heads * pairs

    def bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        pass_ = self.check_pass(pass_)
        rows = self.batch * self.heads * self.queries
        out = rows * self.size * dtype.itemsize  # also dO, the query and dQ
        others = 2 * self.kv_heads * (self.batch * self.queries + self.prompt) * self.size * dtype.itemsize
        lse = rows * max(4, dtype.itemsize)  # also delta
        inputs = out + others
        forward = inputs + out + lse
        backward = (inputs + 2 * out + 2 * lse + out) + (inputs + out + 2 * lse + others)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[pass_]

    def result_bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        pass_ = self.check_pass(pass_)
        out = self.batch * self.heads * self.queries
        gradients = out + 2 * self.kv_heads * (self.batch * self.queries + self.prompt)
        return {FORWARD: out, BACKWARD: gradients, BOTH: out + gradients}[pass_] * self.size * dtype.itemsize

    def tolerance(self, dtype: torch.dtype) -> float:
        return TOLERANCES[dtype]

    def tiny(self) -> Self:
        prompt = min(self.prompt, 4 if self.prompt <= self.queries else 12)
        return replace(self, batch=2, queries=min(self.queries, 6), prompt=prompt)  # some backends serve few head sizes

    def reduced(self, flop: float) -> Self:
        return replace(self, batch=max(1, min(self.batch, int(flop * self.batch / self.flop()))))
