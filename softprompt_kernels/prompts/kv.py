"""KV prompt: trainable keys and values for every layer (prefix tuning, a "cartridge").

    σ = (K, V),  K [L, Hkv, k, D],  V [L, Hkv, k, Dv],   keys after the rotary embedding, at positions 0..k−1

The first tokens of a sequence are attention sinks: heads with nothing to read put their weight on them. Training would
destroy the sinks. Therefore the first `frozen_tokens` (one by default) are buffers, which gradients, weight decay and
momentum cannot change. The other tokens are parameters.

Cost of a step: one concatenation of all layers' keys and one of all values, 4·L·Hkv·k·(D + Dv) bytes written in fp32.
The layers of the prefix are views of these. Without frozen tokens nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from softprompt_kernels.prompts.prefix import Prefix


class KVPrompt(nn.Module):
    """One trainable prefix: prefix tuning (arXiv 2101.00190), and what Cartridges (arXiv 2506.06266) train.

    Parameters `key [L, Hkv, k−n, D]` and `value [L, Hkv, k−n, Dv]` are the trainable tokens. Buffers `frozen_key` and
    `frozen_value` are the first n = `frozen_tokens`. All are fp32 whatever dtype the model computes in, because an
    update of lr·gradient is often below the resolution of bf16.

    Args:
        key: `[L, Hkv, k, D]`, all k tokens, frozen ones first. Copied and converted to fp32 (float64 stays).
        value: `[L, Hkv, k, Dv]`.
        frozen_tokens: n, from 0 to k.

    Raises:
        ValueError: shapes do not fit, k = 0, or `frozen_tokens` is out of range.
    """

    def __init__(self, key: Tensor, value: Tensor, *, frozen_tokens: int = 1) -> None:
        super().__init__()
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3] or key.shape[2] < 1:
            raise ValueError(
                f"key, value: got {tuple(key.shape)} and {tuple(value.shape)}, "
                "accepted are [L, Hkv, k, D] and [L, Hkv, k, Dv] with k ≥ 1"
            )
        if not 0 <= frozen_tokens <= key.shape[2]:
            raise ValueError(
                f"frozen_tokens: got {frozen_tokens}, accepted is 0 to {key.shape[2]} (the prompt's length)"
            )
        self.frozen_key: Tensor
        self.frozen_value: Tensor
        with torch.inference_mode(False):  # a tensor made in inference mode could never be trained
            key, value = to_training_dtype(key), to_training_dtype(value)
            self.key = nn.Parameter(key[:, :, frozen_tokens:].clone())
            self.value = nn.Parameter(value[:, :, frozen_tokens:].clone())
            # Empty buffers stay out of the state: accelerate takes tensors without memory for one tensor.
            stored = frozen_tokens > 0
            self.register_buffer("frozen_key", key[:, :, :frozen_tokens].clone(), persistent=stored)
            self.register_buffer("frozen_value", value[:, :, :frozen_tokens].clone(), persistent=stored)

    @classmethod
    def from_prefix(cls, prefix: Prefix, *, frozen_tokens: int = 1) -> KVPrompt:
        """A trainable copy of a prefix of one row.

        Args:
            prefix: one row of any number of tokens, without padding.
            frozen_tokens: as in `KVPrompt`.

        Raises:
            ValueError: the prefix has several rows (see `PromptBank`), or layers of different shapes, which a KVPrompt
                cannot store.
        """
        if prefix.rows != 1 or prefix.lengths is not None:
            raise ValueError(f"prefix: got {prefix.rows} rows, accepted is one row without padding")
        shapes = [(tuple(key.shape), tuple(value.shape)) for key, value in prefix.layers]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"prefix: got layer {index} of shapes {shape}, accepted are those of layer 0: {shapes[0]}"
                )
        key = torch.cat([key.detach() for key, _ in prefix.layers])
        value = torch.cat([value.detach() for _, value in prefix.layers])
        return cls(key, value, frozen_tokens=frozen_tokens)

    @property
    def length(self) -> int:
        """k tokens, including frozen ones."""
        return self.frozen_tokens + self.key.shape[2]

    @property
    def frozen_tokens(self) -> int:
        """n, the number of tokens at the start that are not trained."""
        return self.frozen_key.shape[2]

    @property
    def num_layers(self) -> int:
        """L, the layers of the model."""
        return self.key.shape[0]

    def stacked(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """All k tokens of all layers, differentiable: `key [L, Hkv, k, D]`, `value [L, Hkv, k, Dv]`.

        Both are in `dtype` (None: as stored, fp32).
        """
        key: Tensor = self.key
        value: Tensor = self.value
        if self.frozen_tokens:
            key = torch.cat((self.frozen_key, self.key), dim=2)
            value = torch.cat((self.frozen_value, self.value), dim=2)
        return key.to(dtype), value.to(dtype)

    def prefix(self, dtype: torch.dtype | None = None) -> Prefix:
        """The prefix of one row that the attention reads, differentiable, in `dtype` (None: as stored, fp32)."""
        key, value = self.stacked(dtype)
        # One unbind for all layers. Its backward is one stack; L indexings would give L scatters into full-size zeros.
        return Prefix.of(zip(key.unsqueeze(1).unbind(), value.unsqueeze(1).unbind(), strict=True))

    def forward(self, dtype: torch.dtype | None = None) -> Prefix:
        """As `prefix`. DistributedDataParallel and hooks see a use of the prompt only if it is called."""
        return self.prefix(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with torch.inference_mode(False):  # `to` makes new parameters
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        layers, heads, _, dim = self.key.shape
        return f"layers={layers}, kv_heads={heads}, tokens={self.length}, head_dim={dim}, frozen={self.frozen_tokens}"


def to_training_dtype(tensor: Tensor) -> Tensor:
    """`tensor`, detached, in the dtype that prompts are trained in: fp32 (float64 stays, for gradient checks)."""
    return tensor.detach().to(tensor.dtype if tensor.dtype == torch.float64 else torch.float32)
