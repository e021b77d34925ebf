"""Problems and implementations of the device benchmark: sizes of a model with 8 billion parameters, in bf16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.counted import peers
from benchmarks.suites import attention_implementations as attentions
from benchmarks.suites import kl_implementations as losses
from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.testing import cases

Results = tuple[Tensor, ...]
Implementation = Callable[[Any], Callable[[], Results]]
OURS = "ours"


class DeviceCase(Protocol):
    """A problem."""

    @property
    def name(self) -> str:
        """Its sizes, as the table shows them."""

    @property
    def bytes(self) -> int:
        """Bytes that every implementation must move."""

    @property
    def flop(self) -> float:
        """Useful FLOP."""

    def inputs(self) -> Any:
        """The inputs, on the default device, from a fixed seed."""

    def expected(self, inputs: Any) -> Results:
        """The results, computed from fp32 copies of the inputs."""

    def implementations(self) -> Mapping[str, Implementation]:
        """All implementations by name; ours is the first."""


def distance(found: Tensor, expected: Tensor) -> float:
    """‖difference‖ / ‖expected‖."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Attention behind a shared prompt.

    Args:
        batch, queries, prompt, heads, kv_heads, size: B, M = N, P, Hq, Hkv, D.
        backward: forward and backward to all five inputs, else forward only.
    """

    batch: int
    queries: int
    prompt: int
    backward: bool
    heads: int = 32
    kv_heads: int = 8
    size: int = 128

    @property
    def name(self) -> str:
        return f"attention {'forward + backward' if self.backward else 'forward'} {self._problem.shape}"

    @property
    def _problem(self) -> cases.PromptAttentionCase:
        return cases.PromptAttentionCase(self.batch, self.heads, self.kv_heads, self.queries, self.prompt, self.size)

    @property
    def flop(self) -> float:
        return self._problem.flop(cases.BOTH if self.backward else cases.FORWARD)

    @property
    def bytes(self) -> int:
        rows, own = self.heads * self.batch * self.queries, self.kv_heads * self.batch * self.queries
        once = 2 * self.size * (2 * rows + 2 * own + 2 * self.kv_heads * self.prompt)
        return once * (3 if self.backward else 1)  # backward: the same and dO, and as many bytes of gradients

    def inputs(self) -> attentions.Inputs:
        made = self._problem.inputs(torch.bfloat16, torch.get_default_device())
        return attentions.Inputs(*(tensor.requires_grad_(self.backward) for tensor in made))

    def expected(self, inputs: attentions.Inputs) -> Results:
        copies = attentions.Inputs(*(tensor.detach().float().requires_grad_(self.backward) for tensor in inputs))
        return self._implementation(lambda given: lambda: prompt_attention(*given, backend="reference"))(copies)()

    def implementations(self) -> Mapping[str, Implementation]:
        if self.queries > 1:
            sdpa = {
                **attentions.MASKED,
                attentions.COMPILED: attentions.compiled(attentions.float_mask),
            }
        else:
            sdpa = attentions.UNMASKED
        implementations = {OURS: attentions.ours, **sdpa, "FlexAttention, compiled": flex_attention}
        return {name: self._implementation(implementation) for name, implementation in implementations.items()}

    def _implementation(self, attention: attentions.Attention) -> Implementation:
        return attentions.as_implementation(attention, self.backward, torch.ones_like)


def flex_attention(inputs: attentions.Inputs) -> Callable[[], Tensor]:
    """FlexAttention over concatenated keys, with a block mask that skips hidden tiles."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    batch, _, queries, _ = inputs.query.shape
    prompt = inputs.prompt_key.shape[2]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + prompt

    mask = create_block_mask(visible, None, None, queries, prompt + queries, device=inputs.query.device.type)
    compiled = torch.compile(flex, dynamic=False)

    def forward() -> Tensor:
        key = torch.cat([inputs.prompt_key.expand(batch, -1, -1, -1), inputs.key], dim=2)
        value = torch.cat([inputs.prompt_value.expand(batch, -1, -1, -1), inputs.value], dim=2)
        return compiled(inputs.query, key, value, block_mask=mask, enable_gqa=True)

    return forward


# --- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Forward KL and the gradient of the student's hidden states.

    Args:
        kind: "live" or "moments", see kl_cases.py.
        tokens, size, vocab: N, d, V.
    """

    kind: str
    tokens: int
    size: int = 4096
    vocab: int = 128256

    @property
    def name(self) -> str:
        return f"{self.kind} KL N{self.tokens} d{self.size} V{self.vocab}"

    @property
    def gemms(self) -> int:
        """The number of GEMMs of the head's size."""
        return 3 if self.kind == "live" else 2

    @property
    def flop(self) -> float:
        return self.gemms * 2.0 * self.tokens * self.size * self.vocab

    @property
    def bytes(self) -> int:
        return 2 * (2 * self.vocab * self.size + self.gemms * self.tokens * self.size)

    def inputs(self) -> losses.Inputs:
        torch.manual_seed(0)
        weight = torch.randn(self.vocab, self.size, dtype=torch.bfloat16).mul_(3 / self.size**0.5)
        teacher = torch.randn(self.tokens, self.size)
        student = teacher + 0.1 * torch.randn(self.tokens, self.size)
        return losses.Inputs(student.bfloat16().requires_grad_(), teacher.bfloat16(), weight)

    def expected(self, inputs: losses.Inputs) -> Results:
        return tuple(losses.chunked(losses.Inputs(*(tensor.detach().float() for tensor in inputs)))())

    def implementations(self) -> Mapping[str, Implementation]:
        if self.kind == "moments":
            return {OURS: losses.from_moments, "F.kl_div, cached teacher": losses.kl_div_with_cached_teacher}
        return {
            OURS: losses.live,
            "F.kl_div of all logits": losses.kl_div_of_all_logits,
            "F.kl_div of all logits, compiled": losses.compiled,
            peers.LIGER_HIDDEN: _peer(peers.liger_hidden),
            peers.FLA_HIDDEN: _peer(peers.fla_hidden),
        }


def _peer(implementation: Callable[..., Callable[[], Any]]) -> Implementation:
    """Keep only loss and gradient of what a peer returns."""

    def prepare(inputs: losses.Inputs) -> Callable[[], Results]:
        run = implementation(*(tensor.detach() for tensor in inputs))
        return lambda: tuple(run()[:2])

    return prepare


CASES: list[DeviceCase] = [
    Attention(8, 512, 256, backward=True),
    Attention(8, 512, 256, backward=False),
    Attention(4, 128, 8192, backward=True),
    Attention(32, 64, 32, backward=True),
    Attention(8, 1, 4096, backward=False),
    Loss("live", 1024),
    Loss("live", 8192),
    Loss("moments", 8192),
]
