"""The keys and values of sequences that are sampled together. Sequences join and leave the batch at any step.

    row r, own token j  →  buffer[r, j]        buffers [rows, columns, Hkv, D], one pair for each layer

Rows 0 to n − 1 are in use. Tokens of a row start at column 0, so the attention op needs only `key_lengths`. When a row
ends, the last row in use takes its place.

Cost: a new token is written once. A row that leaves costs one copy of at most one other row. Buffers are copied when a
sequence needs more columns than they have, which are multiples of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 64  # columns are added in multiples of this


class OwnRows:
    """Keys and values of own tokens.

    Args:
        rows: the largest number of sequences at a time.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, columns: int) -> None:
        """Make room for sequences of `columns` tokens. If that fails for want of memory, see `whole`."""
        if columns <= self.columns:
            return
        before, self.columns = self.columns, -(-columns // _COLUMNS) * _COLUMNS
        for layer, pair in self.layers.items():
            grown = self._empty(pair[0]), self._empty(pair[1])
            for new, old in zip(grown, pair, strict=True):
                new[:, :before] = old
            self.layers[layer] = grown

    @property
    def whole(self) -> bool:
        """Whether all layers have room for the same tokens. Not after a `reserve` that failed halfway."""
        return all(key.shape[1] == value.shape[1] == self.columns for key, value in self.layers.values())

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole rows onto others. A target is not a source."""
        if not sources:
            return
        index = torch.tensor([sources, targets], device="cpu")
        for pair in self.layers.values():
            for buffer in pair:
                source, target = index.to(buffer.device)
                buffer.index_copy_(0, target, buffer.index_select(0, source))

    def write(self, layer: int, key: Tensor, value: Tensor, target: Tensor, source: Tensor | None = None) -> None:
        """Store tokens of one layer.

        Args:
            layer: index of the layer.
            key, value: `[B, Hkv, M, D]`, `[B, Hkv, M, Dv]`, after the rotary embedding.
            target: `[T]` int64, `row · columns + column` of each token.
            source: `[T]` int64, the index of each token in the flattened `[B, M]`. None: all, in order.
        """
        if layer not in self.layers:
            self.layers[layer] = self._empty(key.transpose(1, 2)), self._empty(value.transpose(1, 2))
        target = target.to(key.device)
        for buffer, new in zip(self.layers[layer], (key, value), strict=True):
            tokens = new.transpose(1, 2).flatten(0, 1)
            if source is not None:
                tokens = tokens.index_select(0, source.to(key.device))
            buffer.view(-1, *buffer.shape[2:]).index_copy_(0, target, tokens)

    def read(self, layer: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The first rows and columns of one layer, as views `[rows, Hkv, columns, D]`."""
        key, value = self.layers[layer]
        return key[:rows, :columns].transpose(1, 2), value[:rows, :columns].transpose(1, 2)

    def _empty(self, like: Tensor) -> Tensor:
        """A buffer for `like [..., Hkv, D]`. Zeros, because kernels may read columns past the end of a row."""
        return like.new_zeros(self.rows, self.columns, *like.shape[-2:])


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """A sink that stores the tokens of new sequences. Sequences with the same input share one run of the model.

    Args:
        cache: where to.
        target, source: as in `OwnRows.write`.
    """

    cache: OwnRows
    target: Tensor
    source: Tensor

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store one layer."""
        self.cache.write(layer, key, value, self.target, self.source)


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Stores one more token of each row, and gives the attention all tokens.

    Args:
        cache: of the rows.
        target: `[n]` int64, as in `OwnRows.write`.
        length: tokens of the longest row, with the new one.
    """

    cache: OwnRows
    target: Tensor
    length: int

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, Hkv, 1, D]` of one layer to `[n, Hkv, length, D]`."""
        self.cache.write(layer, key, value, self.target)
        return self.cache.read(layer, key.shape[0], self.length)
