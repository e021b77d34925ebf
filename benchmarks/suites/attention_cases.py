"""Cases of the suite `attention`: a batch behind a shared prompt, forward, or forward and backward to all five inputs.

Sizes, inputs and FLOP are those of `softprompt_kernels.testing`: pairs that the causal mask hides do not count.
The floor is this number of FLOP at the measured rate of the reference GEMM, which is fp32, also for bf16 cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness.case import COMPOSED, Implementation, Rule
from benchmarks.suites import attention_implementations as attentions
from benchmarks.suites.attention_implementations import Attention, Inputs
from softprompt_kernels.bench.rounds import BASELINE, OURS
from softprompt_kernels.testing import cases

FORWARD_SHARE, TRAINING_SHARE = 0.70, 0.65  # required rate, as a share of the reference GEMM's
BF16_TIME = 1.3  # limit of the time in bf16 over that in fp32
UNALIGNED_COST = 1.15  # limit of the time per FLOP at M = 257 over that at M = 256


@dataclass(frozen=True)
class AttentionCase:
    """B sequences of M own tokens behind P shared prompt tokens.

    Args:
        batch, heads, kv_heads, queries, prompt, size: B, Hq, Hkv, M = N, P, D.
        backward: forward and backward, else forward only.
        dtype: of all five tensors.
        sdpa_speedup: required: the time of the fastest concatenation + SDPA over ours; None: nothing is required.
        require_share: whether a share of the reference GEMM's rate is required.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    prompt: int
    size: int
    backward: bool = True
    dtype: torch.dtype = torch.float32
    sdpa_speedup: float | None = None
    require_share: bool = True

    @property
    def name(self) -> str:
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{'fwd+bwd' if self.backward else 'forward'} {kind} {self._problem.shape}"

    @property
    def flop(self) -> float:
        return self._problem.flop(self._pass)

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 4e-2

    @property
    def result_bytes(self) -> int:
        return self._problem.result_bytes(self._pass, self.dtype)

    def inputs(self) -> Inputs:
        return Inputs(*(tensor.requires_grad_(self.backward) for tensor in self._problem.inputs(self.dtype)))

    def implementations(self) -> Mapping[str, tuple[str, Implementation]]:
        made: dict[str, tuple[str, Implementation]] = {OURS: (OURS, self.implementation(attentions.ours))}
        baselines: dict[str, Attention] = {COMPOSED: attentions.composed}
        baselines |= attentions.MASKED if self.queries > 1 else attentions.UNMASKED
        if self.queries > 1 and self.prompt <= self.queries:  # for longer prompts nearly all queries would be padding
            baselines |= attentions.PADDED
        return made | {name: (BASELINE, self.implementation(baseline)) for name, baseline in baselines.items()}

    def compiled(self) -> Mapping[str, tuple[str, Implementation]]:
        if self.dtype != torch.float32 or self in UNALIGNED:
            return {}  # torch.compile leaves SDPA as it is: once for each shape is enough
        eager = next(iter((attentions.MASKED if self.queries > 1 else attentions.UNMASKED).values()))
        return {attentions.COMPILED: (BASELINE, self.implementation(attentions.compiled(eager)))}

    @property
    def _problem(self) -> cases.PromptAttentionCase:
        return cases.PromptAttentionCase(self.batch, self.heads, self.kv_heads, self.queries, self.prompt, self.size)

    @property
    def _pass(self) -> str:
        return cases.BOTH if self.backward else cases.FORWARD

    def rules(self) -> list[Rule]:
        found: list[Rule] = [("speedup over the fastest baseline", 1.0)]
        if self.sdpa_speedup is not None:
            found.append(("speedup over concat + SDPA", self.sdpa_speedup))
        if self.require_share:
            share = TRAINING_SHARE if self.backward else FORWARD_SHARE
            found.append(("rate, as a share of the reference GEMM's", share))
        return found

    def tiny(self) -> AttentionCase:
        queries = min(self.queries, 6)
        prompt = min(self.prompt, 4 if self.prompt <= self.queries else 12)
        return replace(self, batch=2, queries=queries, prompt=prompt, size=16)

    def implementation(self, attention: Attention) -> Implementation:
        """`attention` forward, and with `backward` on to the gradients of the inputs for a fixed gradient of out."""

        def grad_out(query: Tensor) -> Tensor:
            return torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)

        return attentions.as_implementation(attention, self.backward, grad_out)


_SHAPES = [
    (AttentionCase(8, 14, 2, 256, 128, 64), 1.7),
    (AttentionCase(8, 9, 3, 128, 32, 64), 3.0),
    (AttentionCase(4, 16, 8, 512, 64, 64), 2.2),
    (AttentionCase(2, 8, 8, 1024, 16, 128), 2.0),
]
TRAINING = [replace(case, sdpa_speedup=speedup) for case, speedup in _SHAPES]
FORWARD = [replace(case, backward=False) for case, _ in _SHAPES]
LONG_PREFIX = AttentionCase(8, 14, 2, 128, 4096, 64, backward=False, sdpa_speedup=2.0)
# With one query a sequence, reading the prompt from memory is the bound, not the GEMMs.
DECODE = AttentionCase(8, 14, 2, 1, 4096, 64, backward=False, sdpa_speedup=10.0, require_share=False)
BF16 = [replace(case, dtype=torch.bfloat16, sdpa_speedup=None, require_share=False) for case in [*FORWARD, *TRAINING]]
UNALIGNED = [replace(case, queries=257, sdpa_speedup=None, require_share=False) for case in (FORWARD[0], TRAINING[0])]
CASES = [*TRAINING, *FORWARD, LONG_PREFIX, DECODE, *BF16, *UNALIGNED]
