"""PEFT's prefix tuning: the prompt is repeated for each sequence, put into a cache, and concatenated by the layer.

PEFT itself only fills the cache; the rest is transformers. So this is the path of one layer: fill a `DynamicCache`,
update it with the own keys, and call the attention function `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from softprompt_kernels.bench.peers.eager import float_mask
from softprompt_kernels.bench.peers.peer import Peer
from softprompt_kernels.testing.attention import AttentionInputs


def attention(inputs: AttentionInputs) -> Callable[[], Tensor]:
    """The mask is made before, as a model makes it once for all layers."""
    from transformers import DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value, prompt_key, prompt_value = inputs
    layer: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    mask = float_mask(inputs)[None, None] if query.shape[2] > 1 else None
    batch = query.shape[0]

    def forward() -> Tensor:
        cache = DynamicCache()
        cache.update(prompt_key.repeat(batch, 1, 1, 1), prompt_value.repeat(batch, 1, 1, 1), 0)
        keys, values = cache.update(key, value, 0)
        out, _ = sdpa_attention_forward(layer, query, keys, values, mask)
        return out.transpose(1, 2)  # the layer's own order is [B, M, Hq, D]

    return forward


PEFT = Peer(
    "peft",
    "PEFT's prefix tuning",
    {"prompt_attention": attention},
    package="peft",
    install="peft",
)
