"""The cache of own tokens during generation: buffers that grow by doubling, rows packed to the left.

transformers' DynamicCache copies all keys and values for every new token. Here a token is written once, and the rows
of a left-padded batch are stored without their padding, so the attention op reads them with `key_lengths` and no
layer moves anything at any later step:

    token of column c of row b  →  buffer column (c − pads[b]) mod capacity

The modulo sends padding to the end of the buffer, past everything that is real.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_FIRST_CAPACITY = 64  # columns beyond the first tokens


class OwnCache(DynamicCache):
    """A DynamicCache whose layers hold all tokens, sliding layers too: the attention applies the window.

    Args:
        pads: `[B]` int64, padding columns at the start of each row; None: none.
    """

    def __init__(self, pads: Tensor | None = None) -> None:
        super().__init__()
        make_layer: Any = partial(_OwnLayer, pads)
        self.layer_class_to_replicate = make_layer


class _OwnLayer(DynamicLayer):
    """`keys`, `values` are the buffers `[B, Hkv, capacity, D]`; `length` of their columns are in use."""

    keys: Tensor
    values: Tensor

    def __init__(self, pads: Tensor | None) -> None:
        super().__init__()
        self.pads = pads
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, m, D]`; return all columns in use, rows packed to the left."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = (_grown(x, x[:, :, :0], self.length) for x in (key_states, value_states))
        elif self.length > self.keys.shape[2]:
            self.keys, self.values = (_grown(x, x[:, :, :start], self.length) for x in (self.keys, self.values))
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            self._write(buffer, new, start)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _write(self, buffer: Tensor, new: Tensor, start: int) -> None:
        if self.pads is None:
            buffer[:, :, start : self.length] = new
            return
        pads = self.pads.to(new.device)
        if pads.shape[0] != new.shape[0]:  # beams and several samples of one input lie next to each other
            pads = pads.repeat_interleave(new.shape[0] // pads.shape[0])
        column = torch.arange(start, self.length, device=new.device)
        target = (column - pads[:, None]) % buffer.shape[2]
        buffer.scatter_(2, target[:, None, :, None].expand_as(new), new)

    def get_seq_length(self) -> int:
        """Columns in use, padding counted."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `−tokens_to_remove` columns."""
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.length = 0


def _grown(like: Tensor, used: Tensor, length: int) -> Tensor:
    """A buffer of `length` columns and as many again, at least 64 spare, that starts with `used`."""
    capacity = length + max(length, _FIRST_CAPACITY)
    # Zeros, not garbage: columns past a row's end are read by the kernel before it masks them.
    grown = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
    grown[:, :, : used.shape[2]] = used
    return grown
