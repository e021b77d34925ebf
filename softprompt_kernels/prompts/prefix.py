"""A prefix: the keys and values of a soft prompt, for every layer.

Every kind of prompt, and the full context of the teacher, is turned into a prefix before the model runs. A prefix of R
rows is a bank: each sequence of a batch reads one row. The rows are shared in memory and never copied for a batch.

Positions (PEFT's convention): key p of a row has position p, and the rotary embedding was applied at that position. The
sequence that follows starts at position `lengths[r]`, which is P when all rows have the same length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of R prompts in every layer of a model.

    Args:
        layers: one pair `(key [R, Hkv, P, D], value [R, Hkv, P, Dv])` per layer. `Hkv`, `D` and `Dv` may differ from
            layer to layer; R and P may not.
        lengths: `[R]` int64, how many of the P tokens of each row are real; the rest is padding at the end. None: all
            P tokens are real. Values outside 0..P are refused if the tensor is on the CPU; on another device the check
            would have to wait for it.

    Raises:
        ValueError: there are no layers, a layer's shape does not fit the others, or `lengths` does not fit.
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
        """A prefix from any iterable of pairs. Arguments and errors as in `Prefix`; tensors keep their dtype."""
        return cls(tuple((key, value) for key, value in layers), lengths)

    @classmethod
    def stack(cls, prefixes: Sequence[Prefix]) -> Prefix:
        """One bank of the rows of several prefixes, in their order, copied. Shorter ones are padded with zeros.

        Args:
            prefixes: one or more of one model, in one dtype and on one device; of any lengths, 0 too.

        Returns:
            A prefix of Σ R rows and max P tokens, with `lengths`.

        Raises:
            ValueError: there are none, or they have different numbers of layers.
        """
        if not prefixes or len({prefix.num_layers for prefix in prefixes}) > 1:
            layers = [prefix.num_layers for prefix in prefixes]
            raise ValueError(f"prefixes: got {layers} layers, accepted are one or more of the same number of layers")
        longest = max(prefix.length for prefix in prefixes)

        def padded(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([pad(tensor, (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors])

        pairs = zip(*(prefix.layers for prefix in prefixes), strict=True)
        lengths = [
            torch.full((prefix.rows,), prefix.length, device="cpu") if prefix.lengths is None else prefix.lengths.cpu()
            for prefix in prefixes
        ]
        return cls.of(((padded(k for k, _ in pair), padded(v for _, v in pair)) for pair in pairs), torch.cat(lengths))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layers)

    @property
    def rows(self) -> int:
        """R, the number of prompts."""
        return self.layers[0][0].shape[0]

    @property
    def length(self) -> int:
        """P, the tokens of a row, including padding."""
        return self.layers[0][0].shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the keys of the first layer."""
        return self.layers[0][0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys of the first layer."""
        return self.layers[0][0].dtype

    @property
    def nbytes(self) -> int:
        """Size of all keys and values in bytes."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def detach(self) -> Prefix:
        """The same tensors, detached from their graph."""
        return Prefix(tuple((key.detach(), value.detach()) for key, value in self.layers), self.lengths)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Prefix:
        """Keys and values on another `device` or in another `dtype` (None: as they are). `lengths` stays int64."""
        layers = tuple((key.to(device, dtype), value.to(device, dtype)) for key, value in self.layers)
        lengths = self.lengths if self.lengths is None or device is None else self.lengths.to(device)
        return Prefix(layers, lengths)

    def float(self) -> Prefix:
        """Keys and values in fp32. Mixed precision of accelerate calls it, as it does for a module's 16-bit tensors."""
        return self.to(dtype=torch.float32)

    def slice(self, start: int, stop: int) -> Prefix:
        """Tokens `start` to `stop − 1` of every row, as views.

        Keys keep the rotation of their old positions. A slice that starts at 0 is therefore a valid prefix; any other
        slice must first be moved by `−start` (`models.shift_keys`).

        Raises:
            ValueError: `0 ≤ start ≤ stop ≤ P` does not hold.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"start, stop: got {start}, {stop}, accepted is 0 ≤ start ≤ stop ≤ {self.length}")
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, stop - start)
        return Prefix(tuple((key[:, :, start:stop], value[:, :, start:stop]) for key, value in self.layers), lengths)
