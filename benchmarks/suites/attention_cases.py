"""Cases of the suite `attention`: a batch behind a shared prompt, forward, or forward and backward to all five inputs.

Useful FLOP: 4·D for each pair of a query and a key that it sees, and each head, forward; 10·D more backward (scores
again, and the gradients of scores, queries, keys and values). Pairs under the causal mask do not count.
The floor is that many FLOP at the measured rate of a large fp32 product, in bf16 as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.case import COMPOSED, Rule, Way
from benchmarks.harness.comparison import ALTERNATIVE, OURS
from benchmarks.suites import attention_implementations as ways
from benchmarks.suites.attention_implementations import Inputs

FORWARD_SHARE, TRAINING_SHARE = 0.70, 0.65  # of the mm rate, required
BF16_TIME = 1.3  # times that of fp32, required
ODD_COST = 1.15  # of a unit of work at M = 257, times that at M = 256, required


@dataclass(frozen=True)
class AttentionCase:
    """B sequences of M own tokens behind P shared prompt tokens.

    Args:
        batch, heads, kv_heads, queries, prompt, size: B, Hq, Hkv, M = N, P, D.
        backward: forward and backward, else forward.
        dtype: of all five tensors.
        masked_ratio: required of the time of concatenation and SDPA with a mask, over ours; None: nothing.
        share: whether a share of the mm rate is required.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    prompt: int
    size: int
    backward: bool = True
    dtype: torch.dtype = torch.float32
    masked_ratio: float | None = None
    share: bool = True

    @property
    def name(self) -> str:
        sizes = f"B{self.batch} H{self.heads}/{self.kv_heads} M{self.queries} P{self.prompt} D{self.size}"
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{'fwd+bwd' if self.backward else 'forward'} {kind} {sizes}"

    @property
    def flop(self) -> float:
        return ways.useful_flop(self.batch, self.heads, self.queries, self.prompt, self.size, self.backward)

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 4e-2

    @property
    def result_bytes(self) -> int:
        heads = self.heads * (2 if self.backward else 1) + (2 * self.kv_heads if self.backward else 0)
        tokens = self.batch * self.queries * heads + (2 * self.kv_heads * self.prompt if self.backward else 0)
        return tokens * self.size * self.dtype.itemsize

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def tensor(batch: int, heads: int, tokens: int) -> Tensor:
            made = torch.randn(batch, heads, tokens, self.size, generator=generator).to(self.dtype)
            return made.requires_grad_(self.backward)

        own = (self.batch, self.kv_heads, self.queries)
        shared = (1, self.kv_heads, self.prompt)
        query = tensor(self.batch, self.heads, self.queries)
        return Inputs(query, tensor(*own), tensor(*own), tensor(*shared), tensor(*shared))

    def ways(self) -> Mapping[str, tuple[str, Way]]:
        made: dict[str, tuple[str, Way]] = {OURS: (OURS, self.run(ways.ours))}
        others: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {COMPOSED: ways.composed}
        others |= ways.MASKED if self.queries > 1 else ways.UNMASKED
        if self.queries > 1 and self.prompt <= self.queries:  # else nearly all of it would be padding
            others |= ways.PADDED
        return made | {name: (ALTERNATIVE, self.run(way)) for name, way in others.items()}

    def compiled(self) -> Mapping[str, tuple[str, Way]]:
        if self.dtype != torch.float32 or self in ODD:
            return {}  # torch.compile leaves SDPA as it is: once for each shape is enough
        plain = next(iter((ways.MASKED if self.queries > 1 else ways.UNMASKED).values()))
        return {ways.COMPILED: (ALTERNATIVE, self.run(ways.compiled(plain)))}

    def rules(self) -> list[Rule]:
        found: list[Rule] = [("never slower", 1.0)]
        if self.masked_ratio is not None:
            found.append(("times faster than concat + SDPA", self.masked_ratio))
        if self.share:
            found.append(("share of the mm rate", TRAINING_SHARE if self.backward else FORWARD_SHARE))
        return found

    def tiny(self) -> AttentionCase:
        queries = min(self.queries, 6)
        prompt = min(self.prompt, 4 if self.prompt <= self.queries else 12)
        return replace(self, batch=2, queries=queries, prompt=prompt, size=16)

    def run(self, way: Callable[[Inputs], Callable[[], Tensor]]) -> Way:
        """Way to out, and, if wanted, on to the gradients for a fixed gradient of out."""

        def upstream(query: Tensor) -> Tensor:
            return torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)

        return ways.prepared(way, self.backward, upstream)


_SHAPES = [
    (AttentionCase(8, 14, 2, 256, 128, 64), 1.7),
    (AttentionCase(8, 9, 3, 128, 32, 64), 3.0),
    (AttentionCase(4, 16, 8, 512, 64, 64), 2.2),
    (AttentionCase(2, 8, 8, 1024, 16, 128), 2.0),
]
TRAINING = [replace(case, masked_ratio=ratio) for case, ratio in _SHAPES]
FORWARD = [replace(case, backward=False) for case, _ in _SHAPES]
LONG_PREFIX = AttentionCase(8, 14, 2, 128, 4096, 64, backward=False, masked_ratio=2.0)
# One query a sequence is bound by reading the prompt, not by products.
DECODE = AttentionCase(8, 14, 2, 1, 4096, 64, backward=False, masked_ratio=10.0, share=False)
BF16 = [replace(case, dtype=torch.bfloat16, masked_ratio=None, share=False) for case in [*FORWARD, *TRAINING]]
ODD = [replace(case, queries=257, masked_ratio=None, share=False) for case in (FORWARD[0], TRAINING[0])]
CASES = [*TRAINING, *FORWARD, LONG_PREFIX, DECODE, *BF16, *ODD]
