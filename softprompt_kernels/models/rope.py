"""Move the keys of a prefix to other positions.

A rotary key at position p is `k = s·R(p θ) k₀`, with one angular frequency θ a pair of features and a fixed scale s
(yarn). Rotations add, so

    s·R((p + δ) θ) k₀ = R(δ θ) k

is exact, needs neither p nor s, and scores see only differences of positions. Features beyond the rotary part (Phi-3,
GPT-NeoX) stay as they are. All served families pair feature i with feature i + r/2 of the r rotary ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.families import rope_parameters
from softprompt_kernels.prompts.prefix import Prefix

# Frequencies of these depend on how long the sequence is, so there is no rotation that holds for all of them.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def shift_keys(model: PreTrainedModel, prefix: Prefix, delta: int) -> Prefix:
    """`prefix` with all keys at positions `delta` later (earlier if negative). Values are shared, not copied.

    Args:
        model: the model that the keys come from.
        prefix: keys `[R, Hkv, P, D]` after the rotary embedding, at any positions.
        delta: in tokens. A context of C tokens that is cut to k of its keys is moved by `k − C`, so that a sequence
            that continues at k sees them at the distances that it saw them at from C.

    Returns:
        A prefix in the same dtype, differentiable with respect to the given one.

    Raises:
        SoftPromptError: a model with learned positions (delta ≠ 0), or with frequencies that depend on length.
    """
    if delta == 0:
        return prefix
    config = model.config
    parameters = rope_parameters(config)
    if not parameters:
        raise SoftPromptError(
            f"delta: got {delta} for a '{config.model_type}', whose positions are learned and cannot be moved; "
            "accepted is 0"
        )
    for one in parameters.values():
        if one["rope_type"] in _LENGTH_DEPENDENT:
            raise SoftPromptError(
                f"model: got the rotary type '{one['rope_type']}', whose frequencies depend on the length; "
                "accepted are types with fixed frequencies"
            )
    rotary = model.base_model.rotary_emb
    tables: dict[str | None, tuple[Tensor, Tensor]] = {}
    layers = []
    for index, (key, value) in enumerate(prefix.layers):
        layer_type = None if None in parameters else config.layer_types[index]
        if layer_type not in tables:
            tables[layer_type] = _rotation(_frequencies(rotary, layer_type), delta)
        layers.append((_rotate(key, *tables[layer_type]), value))
    return Prefix.of(layers, prefix.lengths)


def _frequencies(rotary: Any, layer_type: str | None) -> Tensor:
    """θ `[r/2]` in radians a token, of one layer type."""
    frequencies: Tensor = rotary.inv_freq if layer_type is None else getattr(rotary, f"{layer_type}_inv_freq")
    return frequencies


def _rotation(frequencies: Tensor, delta: int) -> tuple[Tensor, Tensor]:
    """cos and sin of δθ, `[r/2]` float64: an angle of thousands of radians keeps 1e-12."""
    angle = frequencies.double() * delta
    return angle.cos(), angle.sin()


def _rotate(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary features of `key [R, Hkv, P, D]` turned, the others untouched."""
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    half = cos.shape[0]
    cos, sin = cos.to(key.device, dtype), sin.to(key.device, dtype)
    first, second = key[..., :half].to(dtype), key[..., half : 2 * half].to(dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(key.dtype)
    return torch.cat((turned, key[..., 2 * half :]), dim=-1)
