"""Move the keys of a prefix to other positions.

A rotary key at position p is `k = s·R(p θ) k₀`. Each pair of features has an angular frequency θ, and s is a fixed
scale (yarn has one). The angles of successive rotations add up, so

    s·R((p + δ) θ) k₀ = R(δ θ) k

The shift is exact and needs neither p nor s. Scores depend on differences of positions only. Features after the rotary
part (Phi-3, GPT-NeoX) are unchanged, and so are layers without a rotary embedding (SmolLM3, Cohere 2). Of the r rotary
features, i is paired with i + r/2, or 2i with 2i + 1 in families that are `interleaved`.

Ministral 3 multiplies queries by a function of their position, which is 1 up to `original_max_position_embeddings`.
Shifted keys keep their distances there too, but not this factor.

Cost: one pass over the keys. The values are shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.families import decoder_of, family_of, rope_parameters, text_config
from softprompt_kernels.prompts.prefix import Prefix

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types whose frequencies depend on the length of the sequence. No single rotation moves their keys."""


def shift_keys(model: PreTrainedModel, prefix: Prefix, delta: int | Tensor) -> Prefix:
    """`prefix` with all keys moved by `delta` positions. Values are shared, not copied.

    Rotary scores depend on distances only (RoFormer, arXiv 2104.09864), so rotating the keys moves them.

    Args:
        model: the model that the keys come from.
        prefix: keys `[R, Hkv, P, D]` after the rotary embedding, at any positions.
        delta: in tokens; positive is later. Example: k keys are chosen from a context of C tokens and moved by
            `k − C`. A sequence that continues at position k then has the same distances to them as one that continues
            at C after the whole context. Or `[R]` int64, one for each row.

    Returns:
        A prefix in the same dtype, differentiable with respect to the given one.

    Raises:
        SoftPromptError: delta ≠ 0 for a model with learned positions, or with frequencies that depend on the length.
    """
    if not isinstance(delta, Tensor) and delta == 0:
        return prefix
    config, family = text_config(model), family_of(model)
    parameters = rope_parameters(config)
    if not parameters:
        shown = delta.tolist() if isinstance(delta, Tensor) else delta
        raise SoftPromptError(
            f"delta: got {shown} for a '{config.model_type}', whose positions are learned and cannot be moved; "
            "accepted is 0"
        )
    check_fixed_frequencies(model)
    rotary = decoder_of(model).rotary_emb
    tables: dict[str | None, tuple[Tensor, Tensor]] = {}
    layers = []
    for index, (key, value) in enumerate(prefix.layers):
        if family.has_rotary is not None and not family.has_rotary(config, index):
            layers.append((key, value))
            continue
        layer_type = None if None in parameters else config.layer_types[index]
        if layer_type not in tables:
            tables[layer_type] = _rotation(_frequencies(rotary, layer_type), delta)
        layers.append((_rotate(key, *tables[layer_type], family.interleaved), value))
    return Prefix.of(layers, prefix.lengths)


def check_fixed_frequencies(model: PreTrainedModel) -> None:
    """Raise SoftPromptError if the rotary frequencies of `model` depend on the length: no rotation moves such keys."""
    for settings in rope_parameters(model.config).values():
        if settings["rope_type"] in LENGTH_DEPENDENT:
            raise SoftPromptError(
                f"model: got the rotary type '{settings['rope_type']}', whose frequencies depend on the length; "
                "accepted are types with fixed frequencies"
            )


def _frequencies(rotary: Any, layer_type: str | None) -> Tensor:
    """θ `[r/2]` of one layer type, in radians per token."""
    frequencies: Tensor = rotary.inv_freq if layer_type is None else getattr(rotary, f"{layer_type}_inv_freq")
    return frequencies


def _rotation(frequencies: Tensor, delta: int | Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of δθ, `[r/2]`, or `[R, 1, 1, r/2]` for one δ a row. In float64 an angle of thousands of radians is
    exact to 1e-12."""
    rows = delta.to(frequencies.device)[:, None, None, None] if isinstance(delta, Tensor) else delta
    angle = frequencies.double() * rows
    return angle.cos(), angle.sin()


def _rotate(key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`key [R, Hkv, P, D]` with its rotary features rotated and the others unchanged."""
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    half = cos.shape[-1]
    cos, sin = cos.to(key.device, dtype), sin.to(key.device, dtype)
    # `[..., r/2, 2]` or `[..., 2, r/2]`: the axis of 2 holds the pairs.
    pairs = key[..., : 2 * half].to(dtype).unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    first, second = pairs.unbind(axis)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), axis).flatten(-2).to(key.dtype)
    return torch.cat((rotated, key[..., 2 * half :]), dim=-1)
