"""Problems and ways of the device benchmark: the sizes of a model of 8 billion parameters, in bf16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.counted import peers
from benchmarks.suites import attention_implementations as attention_ways
from benchmarks.suites import kl_implementations as kl_ways
from softprompt_kernels.ops import prompt_attention

Results = tuple[Tensor, ...]
Way = Callable[[Any], Callable[[], Results]]
OURS = "ours"


class DeviceCase(Protocol):
    """A problem."""

    @property
    def name(self) -> str:
        """Its sizes."""

    @property
    def bytes(self) -> int:
        """That no way can do without."""

    @property
    def flop(self) -> float:
        """Useful ones."""

    def inputs(self) -> Any:
        """On the default device, from a fixed seed."""

    def right(self, inputs: Any) -> Results:
        """The results, from fp32 copies."""

    def ways(self) -> Mapping[str, Way]:
        """Ours is first."""


def distance(found: Tensor, right: Tensor) -> float:
    """‖difference‖ / ‖right‖."""
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm().clamp_min(1e-30))


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Letters as in attention_problem.py; forward, or forward and backward to all five inputs."""

    batch: int
    queries: int
    prompt: int
    backward: bool
    heads: int = 32
    kv_heads: int = 8
    size: int = 128

    @property
    def name(self) -> str:
        sizes = f"B{self.batch} H{self.heads}/{self.kv_heads} M{self.queries} P{self.prompt} D{self.size}"
        return f"attention {'forward + backward' if self.backward else 'forward'} {sizes}"

    @property
    def flop(self) -> float:
        return attention_ways.useful_flop(self.batch, self.heads, self.queries, self.prompt, self.size, self.backward)

    @property
    def bytes(self) -> int:
        rows, own = self.heads * self.batch * self.queries, self.kv_heads * self.batch * self.queries
        once = 2 * self.size * (2 * rows + 2 * own + 2 * self.kv_heads * self.prompt)
        return once * (3 if self.backward else 1)  # backward: all of it and dO, and as many gradients

    def inputs(self) -> attention_ways.Inputs:
        torch.manual_seed(0)

        def tensor(batch: int, tokens: int, heads: int) -> Tensor:
            made = torch.randn(batch, tokens, heads, self.size, dtype=torch.bfloat16).transpose(1, 2)
            return made.requires_grad_(self.backward)

        own = (self.batch, self.queries, self.kv_heads)
        shared = (1, self.prompt, self.kv_heads)
        query = tensor(self.batch, self.queries, self.heads)
        return attention_ways.Inputs(query, tensor(*own), tensor(*own), tensor(*shared), tensor(*shared))

    def right(self, inputs: attention_ways.Inputs) -> Results:
        wide = attention_ways.Inputs(*(tensor.detach().float().requires_grad_(self.backward) for tensor in inputs))
        return self._run(lambda given: lambda: prompt_attention(*given, backend="reference"))(wide)()

    def ways(self) -> Mapping[str, Way]:
        if self.queries > 1:
            sdpa = {
                **attention_ways.MASKED,
                attention_ways.COMPILED: attention_ways.compiled(attention_ways.float_mask),
            }
        else:
            sdpa = attention_ways.UNMASKED
        ways = {OURS: attention_ways.ours, **sdpa, "FlexAttention, compiled": flex_attention}
        return {name: self._run(way) for name, way in ways.items()}

    def _run(self, way: Callable[[attention_ways.Inputs], attention_ways.Forward]) -> Way:
        return attention_ways.prepared(way, self.backward, torch.ones_like)


def flex_attention(inputs: attention_ways.Inputs) -> Callable[[], Tensor]:
    """Over concatenated keys, with a block mask that skips what is hidden."""
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
    """Forward KL and its gradient by the student: N tokens of size d, V words."""

    kind: str  # live, moments
    tokens: int
    size: int = 4096
    vocab: int = 128256

    @property
    def name(self) -> str:
        return f"{self.kind} KL N{self.tokens} d{self.size} V{self.vocab}"

    @property
    def products(self) -> int:
        """Of the head's size."""
        return 3 if self.kind == "live" else 2

    @property
    def flop(self) -> float:
        return self.products * 2.0 * self.tokens * self.size * self.vocab

    @property
    def bytes(self) -> int:
        return 2 * (2 * self.vocab * self.size + self.products * self.tokens * self.size)

    def inputs(self) -> kl_ways.Inputs:
        torch.manual_seed(0)
        weight = torch.randn(self.vocab, self.size, dtype=torch.bfloat16).mul_(3 / self.size**0.5)
        teacher = torch.randn(self.tokens, self.size)
        student = teacher + 0.1 * torch.randn(self.tokens, self.size)
        return kl_ways.Inputs(student.bfloat16().requires_grad_(), teacher.bfloat16(), weight)

    def right(self, inputs: kl_ways.Inputs) -> Results:
        return tuple(kl_ways.chunked(kl_ways.Inputs(*(tensor.detach().float() for tensor in inputs)))())

    def ways(self) -> Mapping[str, Way]:
        if self.kind == "moments":
            return {OURS: kl_ways.from_moments, "F.kl_div, teacher kept": kl_ways.kept}
        return {
            OURS: kl_ways.live,
            "F.kl_div of all logits": kl_ways.plain,
            "F.kl_div of all logits, compiled": kl_ways.compiled,
            peers.LIGER_HIDDEN: _peer(peers.liger_hidden),
            peers.FLA_HIDDEN: _peer(peers.fla_hidden),
        }


def _peer(way: Callable[..., Callable[[], Any]]) -> Way:
    """Of what a peer returns, loss and gradient."""

    def prepare(inputs: kl_ways.Inputs) -> Callable[[], Results]:
        run = way(*(tensor.detach() for tensor in inputs))
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
