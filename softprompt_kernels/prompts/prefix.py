"""A prefix: what a soft prompt is to the attention, keys and values for every layer.

Every kind of prompt, and the full context of the teacher, ends as one of these before the model runs. A prefix of
R rows is a bank: each sequence of a batch reads one row, and all of them read the same memory.

Convention of positions (PEFT's): key p of a row sits at position p and has been through the rotary embedding there;
the sequence that follows starts at position `lengths[r]`, which is P when all rows have the same length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of R prompts in every layer of a model.

    Args:
        layers: one `(key [R, Hkv, P, D], value [R, Hkv, P, Dv])` a layer. `Hkv`, `D` and `Dv` may differ from layer
            to layer; R and P may not.
        lengths: `[R]` int64, how many of the P tokens of each row are real; the rest is padding at the end. None:
            all P of every row. Checked against 0..P where it lies on the CPU (elsewhere that would wait for the
            device).

    Raises:
        ValueError: no layer, or a layer whose shape does not fit the others.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: got an empty sequence, accepted is one (key, value) pair for each layer")
        first = self.layers[0][0]
        if first.dim() != 4:
            raise ValueError(f"layers[0]: got a key of shape {tuple(first.shape)}, accepted is [R, Hkv, P, D]")
        rows, _, length, _ = first.shape
        for index, (key, value) in enumerate(self.layers):
            if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
                raise ValueError(
                    f"layers[{index}]: got key {tuple(key.shape)} and value {tuple(value.shape)}, "
                    "accepted are [R, Hkv, P, D] and [R, Hkv, P, Dv]"
                )
            if (key.shape[0], key.shape[2]) != (rows, length):
                raise ValueError(
                    f"layers[{index}]: got {key.shape[0]} rows of {key.shape[2]} tokens, "
                    f"accepted is what layer 0 has: {rows} rows of {length} tokens"
                )
        if self.lengths is not None:
            if self.lengths.shape != (rows,) or self.lengths.dtype != torch.int64:
                raise ValueError(
                    f"lengths: got {self.lengths.dtype} of shape {tuple(self.lengths.shape)}, "
                    f"accepted is torch.int64 of shape ({rows},)"
                )
            if self.lengths.device.type == "cpu" and bool(((self.lengths < 0) | (self.lengths > length)).any()):
                raise ValueError(f"lengths: got {self.lengths.tolist()}, accepted is 0 to {length} for each row")

    @classmethod
    def of(cls, layers: Iterable[tuple[Tensor, Tensor]], lengths: Tensor | None = None) -> Prefix:
        """A prefix from any iterable of `(key, value)` pairs."""
        return cls(tuple((key, value) for key, value in layers), lengths)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def rows(self) -> int:
        """R, the prompts of the bank."""
        return self.layers[0][0].shape[0]

    @property
    def length(self) -> int:
        """P, tokens of a row, padding included."""
        return self.layers[0][0].shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the keys of the first layer."""
        return self.layers[0][0].device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the keys of the first layer."""
        return self.layers[0][0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def detach(self) -> Prefix:
        """The same memory without its graph."""
        return Prefix(tuple((key.detach(), value.detach()) for key, value in self.layers), self.lengths)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prefix:
        """Keys and values in another place or type; lengths follow the device and stay int64."""
        layers = tuple((key.to(device, dtype), value.to(device, dtype)) for key, value in self.layers)
        lengths = self.lengths if self.lengths is None or device is None else self.lengths.to(device)
        return Prefix(layers, lengths)

    def slice(self, start: int, stop: int) -> Prefix:
        """Tokens `start` to `stop − 1` of every row, as views.

        Keys keep the rotation of the positions that they came from. A slice that starts at 0 is therefore a valid
        prefix; any other has to be rotated by `−start` first.

        Raises:
            ValueError: not `0 ≤ start ≤ stop ≤ P`.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"start, stop: got {start}, {stop}, accepted is 0 ≤ start ≤ stop ≤ {self.length}")
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        return Prefix(tuple((key[:, :, start:stop], value[:, :, start:stop]) for key, value in self.layers), lengths)
