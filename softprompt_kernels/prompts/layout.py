"""PEFT's layout of a KV prompt: one row of floats per token.

    flat [k, L·2·Hkv·D],  row t = concat over layers of (key_t [Hkv, D], value_t [Hkv, D])

Keys are after the rotary embedding, with token t at position t. PREFIX_TUNING and CARTRIDGE use the same layout. PEFT
reads it as `view(k, 2L, Hkv, D)` with `token_dim = Hkv·D` and `num_attention_heads = Hkv`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flatten(key: Tensor, value: Tensor) -> Tensor:
    """`key, value [L, Hkv, k, D]` to `[k, L·2·Hkv·D]`, contiguous.

    Raises:
        ValueError: keys and values have different shapes. The layout has one head dimension for both.
    """
    if key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            f"key, value: got {tuple(key.shape)} and {tuple(value.shape)}, accepted is one shape [L, Hkv, k, D]: "
            "PEFT's layout has the same head dimension for both"
        )
    tokens = key.shape[2]
    return torch.stack((key, value), dim=1).permute(3, 0, 1, 2, 4).reshape(tokens, -1).contiguous()


def unflatten(flat: Tensor, layers: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """`[k, L·2·Hkv·D]` back to `key, value [L, Hkv, k, D]`, as views.

    Raises:
        ValueError: `flat` is not a matrix, or its rows do not divide into `layers` pairs of `kv_heads` heads.
    """
    if flat.dim() != 2 or layers < 1 or kv_heads < 1 or flat.shape[1] % (2 * layers * kv_heads):
        raise ValueError(
            f"flat: got shape {tuple(flat.shape)}, accepted is [k, {layers}·2·{kv_heads}·D] "
            f"({layers} layers, {kv_heads} heads)"
        )
    stacked = flat.view(flat.shape[0], layers, 2, kv_heads, -1).permute(1, 2, 3, 0, 4)
    return stacked[:, 0], stacked[:, 1]
