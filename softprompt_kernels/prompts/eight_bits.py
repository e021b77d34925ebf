"""A prompt in 8 bits: codes from 0 to 255, with a scale and a lowest number for each group of numbers.

    x ≈ low + scale · code,   scale = (max − min) / 255 of the group,   |error| ≤ scale / 2

| numbers | a group is | because |
|---|---|---|
| keys `[L, Hkv, k, D]` | one channel of one head, 32 tokens | a few channels of the keys are much larger than others |
| values `[L, Hkv, k, D]` | one token of one head | an error stays with its token |
| vectors `[k, d]` | one token | as for values |

The split of keys by channel and values by token is that of KIVI (arXiv 2402.02750). It was chosen with two prompts of
SmolLM2-135M (86 and 300 tokens) on one text of 28 tokens each. Keys by channel gave a half and a fifth of the KL of
keys by token, values by token a fifth and a quarter of the KL of values by channel. Symmetric codes gave more error in
each case. Keys before and after their rotary embedding gave the same error, so they stay as they are stored.

Cost: 1.25 bytes a key and `1 + 8/D` a value or vector, scales included, which are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError

KEY_TOKENS = 32
"""Tokens of a group of keys."""

LEVELS = 255


def pack(name: str, numbers: Tensor) -> dict[str, Tensor]:
    """The codes, scales and lowest numbers of a part of a prompt.

    Args:
        name: "key", "value" or "embedding"; it decides the groups.
        numbers: `[L, Hkv, k, D]` fp32, or `[k, d]` for "embedding".

    Returns:
        `NAME.codes` uint8 of the same shape, `NAME.scale` and `NAME.low` fp32: `[L, Hkv, ceil(k/32), D]` for keys, the
        shape with a last size of 1 for the others.
    """
    axis, groups = (-2, numbers.split(KEY_TOKENS, dim=-2)) if name == "key" else (-1, (numbers,))
    low = torch.cat([group.amin(axis, keepdim=True) for group in groups], axis)
    high = torch.cat([group.amax(axis, keepdim=True) for group in groups], axis)
    scale = (high - low) / LEVELS
    per_number = _spread(name, scale, numbers.shape)
    steps = (numbers - _spread(name, low, numbers.shape)) / torch.where(per_number > 0, per_number, 1.0)
    return {f"{name}.codes": steps.round().clamp(0, LEVELS).to(torch.uint8), f"{name}.scale": scale, f"{name}.low": low}


def unpack(file: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The numbers of a part, in fp32.

    Args:
        file: for the error message.
        name: as in `pack`.
        tensors: what `pack` gave: `NAME.codes` `[..., k, D]` uint8, and its scales and lowest numbers, fp32.

    Returns:
        `[L, Hkv, k, D]`, or `[k, d]` for "embedding".

    Raises:
        SoftPromptError: a tensor is missing, or has another dtype or shape than `pack` gives.
    """
    try:
        codes, scale, low = (tensors[f"{name}.{part}"] for part in ("codes", "scale", "low"))
    except KeyError as error:
        raise SoftPromptError(f"{file} has no tensor {error.args[0]}") from error
    dimensions = 2 if name == "embedding" else 4
    if codes.dtype != torch.uint8 or codes.dim() != dimensions or 0 in codes.shape:
        raise SoftPromptError(
            f"{file}: {name}.codes is {str(codes.dtype).removeprefix('torch.')} of shape {tuple(codes.shape)}, "
            f"accepted is uint8 with {dimensions} dimensions"
        )
    expected = (*codes.shape[:-1], 1)
    if name == "key":
        expected = (*codes.shape[:-2], -(-codes.shape[-2] // KEY_TOKENS), codes.shape[-1])
    for part, tensor in (("scale", scale), ("low", low)):
        if tensor.dtype != torch.float32 or tensor.shape != expected:
            raise SoftPromptError(
                f"{file}: {name}.{part} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, "
                f"accepted is float32 of shape {tuple(expected)}"
            )
    return codes.float() * _spread(name, scale, codes.shape) + _spread(name, low, codes.shape)


def _spread(name: str, of_groups: Tensor, shape: torch.Size) -> Tensor:
    """One number for each group as one for each number of a part of `shape`, without a copy where there is no group
    of tokens."""
    if name != "key":
        return of_groups.expand(shape)
    return of_groups.repeat_interleave(KEY_TOKENS, dim=-2)[..., : shape[-2], :]
