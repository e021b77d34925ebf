"""The KV cache of own tokens during generation. Its buffers double when they are full.

transformers' DynamicCache copies all keys and values for every new token. This cache writes each token once. It stores
the rows of a left-padded batch without their padding, so real tokens start at buffer column 0:

    token in column c of row b  →  buffer column (c − pads[b]) mod capacity

The attention op then needs only `key_lengths`, and no layer moves keys at later steps. The modulo puts padding at the
end of the buffer, after all real tokens.

Cost of a step: m new tokens are written, none is moved. A full buffer is copied once into one of twice the size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_MIN_SPARE = 64  # least number of free columns in a new buffer


class OwnCache(DynamicCache):
    """A DynamicCache whose layers keep all tokens. Sliding layers do so too: the attention applies their window.

    Args:
        pads: `[B]` int64, number of padding columns at the start of each row. None: no padding.
    """

    def __init__(self, pads: Tensor | None = None) -> None:
        super().__init__()
        make_layer: Any = partial(_OwnLayer, pads)
        self.layer_class_to_replicate = make_layer


class _OwnLayer(DynamicLayer):
    """One layer. `keys` and `values` are buffers `[B, Hkv, capacity, D]`; the first `length` columns are in use."""

    keys: Tensor
    values: Tensor

    def __init__(self, pads: Tensor | None) -> None:
        super().__init__()
        self.pads = pads
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, m, D]`. Returns all columns in use; in each row the real tokens come first."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = (_grow(x, x[:, :, :0], self.length) for x in (key_states, value_states))
        elif self.length > self.keys.shape[2]:
            self.keys, self.values = (_grow(x, x[:, :, :start], self.length) for x in (self.keys, self.values))
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            self._write(buffer, new, start)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _write(self, buffer: Tensor, new: Tensor, start: int) -> None:
        if self.pads is None:
            buffer[:, :, start : self.length] = new
            return
        pads = self.pads.to(new.device)
        if pads.shape[0] != new.shape[0]:  # the beams or samples of one input are neighbouring rows
            pads = pads.repeat_interleave(new.shape[0] // pads.shape[0])
        column = torch.arange(start, self.length, device=new.device)
        target = (column - pads[:, None]) % buffer.shape[2]
        buffer.scatter_(2, target[:, None, :, None].expand_as(new), new)

    def get_seq_length(self) -> int:
        """Number of columns in use, including padding."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `abs(tokens_to_remove)` columns."""
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.length = 0


def _grow(like: Tensor, used: Tensor, length: int) -> Tensor:
    """A buffer of twice `length` columns (at least 64 of them free) that starts with a copy of `used`."""
    capacity = length + max(length, _MIN_SPARE)
    # Filled with zeros, because the kernel reads columns past the end of a row before it masks them.
    grown = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
    grown[:, :, : used.shape[2]] = used
    return grown
