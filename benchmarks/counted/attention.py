"""Attention of B sequences behind a shared prompt: what is counted, by whom, and the floors.

| floor | reads and writes |
|---|---|
| forward | inputs and results once |
| backward | dQ: reads inputs, dO, out and lse, writes dQ and delta = rowsum(dO∘out) |
| | dK/dV: reads inputs, dO, lse and delta, writes the other four gradients |

All but the op put a copy of the prompt before the keys of each sequence, as one does without it. SDPA counts as one
kernel that reads its inputs once, mask included: a lower bound, which FlashAttention reaches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.counted import peers
from benchmarks.counted.aten_traffic import bytes_of
from benchmarks.counted.record import OURS, PEER, PYTORCH, Count, count, left_out
from softprompt_kernels import prompt_attention

OP = "prompt_attention"
PASSES = ("forward", "backward")
PEFT = "PEFT prefix tuning, one layer (SDPA)"
OURS_APART = "ours without the shared prompt"
NOT_COUNTED = {"flex_attention": peers.COMPILED, "torch.compile of PyTorch eager": peers.COMPILED}
Attention = Callable[..., Tensor]  # (query, key, value, prompt_key, prompt_value) -> out [B, Hq, M, D]


@dataclass(frozen=True)
class AttentionCase:
    """`batch, heads, kv_heads, queries, prompt, size`: B, Hq, Hkv, M = N, P, D."""

    batch: int = 4
    heads: int = 4
    kv_heads: int = 2
    queries: int = 64
    prompt: int = 64
    size: int = 16

    @property
    def name(self) -> str:
        return f"B{self.batch} H{self.heads}/{self.kv_heads} M{self.queries} P{self.prompt} D{self.size}"

    def inputs(self) -> list[Tensor]:
        """query, key, value, prompt_key, prompt_value."""
        generator = torch.Generator().manual_seed(0)

        def tensor(batch: int, heads: int, tokens: int) -> Tensor:
            return torch.randn(batch, heads, tokens, self.size, generator=generator)

        def projected(heads: int) -> Tensor:  # in memory as a projection leaves it: tokens before heads
            return tensor(self.batch, self.queries, heads).transpose(1, 2)

        made = [projected(self.heads), projected(self.kv_heads), projected(self.kv_heads)]
        made += [tensor(1, self.kv_heads, self.prompt) for _ in range(2)]
        return [one.requires_grad_() for one in made]

    def floors(self) -> tuple[int, int]:
        """Bytes of forward and backward."""
        query, *others = self.inputs()
        inputs, out = bytes_of(query, *others), bytes_of(query)
        lse = out // self.size
        query_pass = inputs + 2 * out + 2 * lse + bytes_of(query)  # reads out, dO, lse, writes dQ and delta
        key_pass = inputs + out + 2 * lse + bytes_of(*others)
        return inputs + out + lse, query_pass + key_pass


ATTENTION = [AttentionCase(batch=2), AttentionCase(batch=4), AttentionCase(queries=1, prompt=512)]


def count_attention(case: AttentionCase) -> list[Count]:
    """Forward and backward, by every implementation."""
    implementations: dict[str, tuple[str, Attention]] = {
        "prompt_attention": (OURS, _shared),
        "our kernels, prompt concatenated": (OURS_APART, _concatenated),
        "PyTorch eager, prompt concatenated": (PYTORCH, _eager),
        "SDPA, prompt concatenated": (PYTORCH, _sdpa),
    }
    counts = [_forward_and_backward(case, name, *chosen, case.inputs()) for name, chosen in implementations.items()]
    floors = case.floors()
    if importlib.util.find_spec("peft") is None:
        counts.append(_nobody(case, floors, PEFT, "peft is not installed: pip install peft"))
    else:
        counts.append(_forward_and_backward(case, PEFT, PEER, *_peft(case)))
    counts += [_nobody(case, floors, name, reason) for name, reason in NOT_COUNTED.items()]
    return [count for pair in counts for count in pair]


def _forward_and_backward(
    case: AttentionCase, implementation: str, role: str, attention: Attention, inputs: list[Tensor]
) -> list[Count]:
    upstream = torch.ones_like(inputs[0])
    made: list[Tensor] = []

    def forward() -> None:
        made.append(attention(*inputs))

    def backward() -> None:
        torch.autograd.grad(made[0], inputs, upstream)

    return [
        count(f"{OP} {part}", case.name, implementation, role, floor, run)
        for part, floor, run in zip(PASSES, case.floors(), (forward, backward), strict=True)
    ]


def _nobody(case: AttentionCase, floors: tuple[int, int], implementation: str, reason: str) -> list[Count]:
    return [
        left_out(f"{OP} {part}", case.name, implementation, PEER, floor, reason)
        for part, floor in zip(PASSES, floors, strict=True)
    ]


# --- implementations --------------------------------------------------------------------------------------------------


def _shared(*inputs: Tensor) -> Tensor:
    return prompt_attention(*inputs, backend="triton")


def _concatenated(query: Tensor, *others: Tensor) -> Tensor:
    none = [prompt[:, :, :0] for prompt in others[2:]]
    return prompt_attention(query, *_joined(len(query), *others), *none, backend="triton")


def _eager(query: Tensor, *others: Tensor) -> Tensor:
    key, value = (_repeated(query, tensor) for tensor in _joined(len(query), *others))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~_causal(query, key), float("-inf")).softmax(dim=-1) @ value


def _sdpa(query: Tensor, *others: Tensor) -> Tensor:
    key, value = _joined(len(query), *others)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_causal(query, key), enable_gqa=True)


def _peft(case: AttentionCase) -> tuple[Attention, list[Tensor]]:
    """One layer of prefix tuning: the encoder's prompt for each sequence, transformers' cache and its SDPA.

    The inputs are query, key, value, and the embeddings of the encoder, `[P, 2·Hkv·D]`.
    """
    from peft import PrefixTuningConfig
    from peft.tuners.prefix_tuning import PrefixEncoder
    from transformers import DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value, prompt_key, prompt_value = case.inputs()
    embeddings = torch.stack((prompt_key[0], prompt_value[0])).detach().permute(2, 0, 1, 3).flatten(1)
    heads, indices = case.kv_heads, torch.arange(case.prompt).expand(case.batch, -1)
    sizes = {"num_virtual_tokens": case.prompt, "token_dim": heads * case.size, "num_layers": 1}
    encoder = PrefixEncoder(PrefixTuningConfig(num_attention_heads=heads, encoder_hidden_size=1, **sizes))
    layer = SimpleNamespace(num_key_value_groups=case.heads // heads, is_causal=True)

    def attention(query: Tensor, key: Tensor, value: Tensor, embeddings: Tensor) -> Tensor:
        prompt = torch.func.functional_call(encoder, {"embedding.weight": embeddings}, indices)
        cache = DynamicCache()
        cache.update(*prompt.view(*indices.shape, 2, heads, case.size).permute(2, 0, 3, 1, 4), 0)
        key, value = cache.update(key, value, 0)
        return sdpa_attention_forward(layer, query, key, value, _causal(query, key))[0].transpose(1, 2)

    return attention, [query, key, value, embeddings.requires_grad_()]


def _joined(batch: int, key: Tensor, value: Tensor, *prompt: Tensor) -> list[Tensor]:
    """Keys and values behind a copy of the prompt for each sequence."""
    own = (key, value)
    return [torch.cat((shared.expand(batch, -1, -1, -1), mine), 2) for shared, mine in zip(prompt, own, strict=True)]


def _repeated(query: Tensor, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """`[1, 1, M, P + M]`, True where a query sees a key."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
