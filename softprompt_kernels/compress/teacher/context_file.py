"""The keys and values of a context in a file, written while they are computed and mapped into memory to be read.

    header                     JSON: names, shapes and places of the tensors, and what the file was made from
    key.0    [R, Hkv, C, D]    layer 0, for all C tokens
    value.0  [R, Hkv, C, Dv]
    key.1    …

It is a safetensors file, `context.safetensors`. Until all tokens are there it is called `context.safetensors.partial`.
Its size is reserved at the start, so a full disk is found before the work. A chunk of tokens is written to its place in
every tensor. Then the file is synced, and the header says how many tokens are complete. A capture that was interrupted
goes on behind them, with the same bits as without the interruption: a chunk depends on the tokens before it alone, and
reads them from the file in any case.

The tensors are views of a read-only map of the file. The system reads the pages of a layer when the layer is used, and
drops them when memory is short. They may not be written to.

Cost: C tokens written once. Memory: a chunk of one layer.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.finite import fitting_cast
from softprompt_kernels.prompts import Prefix
from softprompt_kernels.sizes import size

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ALIGNMENT = 4096  # of the first tensor
_DIGITS = 12  # of the number of complete tokens, which is written over


@dataclass(frozen=True)
class _Place:
    """Where a tensor `[R, Hkv, C, D]` is.

    Args:
        offset: its first byte in the file.
        shape, dtype: of the tensor.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ContextFile:
    """A file of keys and values that is being filled, or is complete. A `TokenStore`.

    Args:
        path: of the file when it is complete. Its folder exists.
        made_from: everything that the content depends on, by name, in strings.
        layers: keys and values of every layer, with any number of tokens; they give the shapes.
        total: C, the tokens of the context, with those of a prefix before it.
        dtype: of the tensors.

    Raises:
        SoftPromptError: there is no room on the disk, or the folder cannot be written to.

    `remark` says why a file that was there is not used, if one was there.
    """

    def __init__(
        self, path: Path, made_from: Mapping[str, str], layers: Prefix, total: int, dtype: torch.dtype
    ) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.total, self.dtype = total, dtype
        self.remark: str | None = None
        self.length = 0
        self._made_from = dict(made_from) | {"total": str(total), "dtype": str(dtype).removeprefix("torch.")}
        shapes = {
            f"{name}.{index}": (*tensor.shape[:2], total, tensor.shape[3])
            for index, pair in enumerate(layers.layers)
            for name, tensor in zip(("key", "value"), pair, strict=True)
        }
        self._header, self._places, self._filled_at = _new_header(self._made_from, shapes, dtype)
        found = next((one for one in (self.path, self.partial) if self._is_ours(one)), None)
        if found is None:
            found = self._reserve()
        self._file = found.open("rb" if found == self.path else "r+b")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._tensors = [
            (self._view(self._places[f"key.{index}"]), self._view(self._places[f"value.{index}"]))
            for index in range(layers.num_layers)
        ]

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return len(self._header) + sum(place.nbytes for place in self._places.values())

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the new tokens of one layer behind the complete ones.

        Raises:
            SoftPromptError: the disk is full or fails, or a number does not fit the dtype of the file.
        """
        for name, new in (("key", key), ("value", value)):
            place = self._places[f"{name}.{layer}"]
            new = fitting_cast(new.detach(), self.dtype, "context_dtype").cpu().contiguous()
            row_bytes = place.shape[3] * self.dtype.itemsize
            heads = new.view(-1, *new.shape[2:]).view(torch.uint8).flatten(1)
            try:
                for head, data in enumerate(heads):
                    self._file.seek(place.offset + (head * self.total + self.length) * row_bytes)
                    self._file.write(memoryview(data.numpy()))
            except OSError as error:
                raise self._cannot_write(error) from error

    def advance(self, tokens: int) -> None:
        """So many more tokens are complete in all layers. At the end the file gets its name.

        Raises:
            SoftPromptError: the disk is full or fails.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.length += tokens
            self._file.seek(self._filled_at)
            self._file.write(_digits(self.length))
            self._file.flush()
            if self.length == self.total:
                os.fsync(self._file.fileno())
                self.partial.replace(self.path)
        except OSError as error:
            raise self._cannot_write(error) from error

    def prefix(self) -> Prefix:
        """The complete tokens, as views of the mapped file."""
        return Prefix.of((key[:, :, : self.length], value[:, :, : self.length]) for key, value in self._tensors)

    def close(self) -> None:
        """No more tokens are written. What `prefix` gave stays mapped."""
        self._file.close()

    def _view(self, place: _Place) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(
                self._map, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset
            ).view(place.shape)

    def _is_ours(self, path: Path) -> bool:
        """Whether a file holds tokens of this context; sets `length` or `remark`."""
        try:
            header, count = _read_header(path)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.remark = f"{path} cannot be read, and is made again."
            return False
        found = header.get("__metadata__", {})
        differs = [name for name, value in self._made_from.items() if found.get(name) != value]
        if differs:
            names = " and ".join(name.replace("_", " ") for name in differs)
            self.remark = f"{path} was made with another {names}, and is made again."
            return False
        filled = str(found.get("filled"))
        expected = self.total if path == self.path else None
        if (
            count != len(self._header)
            or path.stat().st_size != self.nbytes
            or not filled.isdecimal()
            or int(filled) > self.total
            or expected not in (None, int(filled))
        ):
            self.remark = f"{path} is damaged or cut off, and is made again."
            return False
        self.length = int(filled)
        return True

    def _reserve(self) -> Path:
        """A new file of its full size."""
        try:
            self.path.unlink(missing_ok=True)
            with self.partial.open("wb") as file:
                file.truncate(self.nbytes)
                if hasattr(os, "posix_fallocate"):
                    try:
                        os.posix_fallocate(file.fileno(), 0, self.nbytes)
                    except OSError as error:
                        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                            raise
                file.write(self._header)
        except OSError as error:
            with suppress(OSError):
                self.partial.unlink(missing_ok=True)
            raise self._cannot_write(error) from error
        return self.partial

    def _cannot_write(self, error: OSError) -> SoftPromptError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(self.path.parent).free
            return SoftPromptError(
                f"output: {self.path.parent} has no room for the keys and values of the context: {size(self.nbytes)} "
                f"are needed, {size(free)} are free; free some, choose another folder, give context_memory more if "
                "there is memory, or store them in 16 bits with context_dtype"
            )
        return SoftPromptError(f"output: {self.path} cannot be written ({error.strerror})")


def _new_header(
    made_from: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[bytes, dict[str, _Place], int]:
    """The header of an empty file, the places of its tensors, and that of the number of complete tokens."""
    names = {value: name for name, value in DTYPES.items()}
    tensors, places, end = {}, {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        tensors[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = begin
    text = json.dumps({"__metadata__": {"filled": _digits(0).decode(), **made_from}, **tensors}).encode()
    text = text.ljust((len(text) + 8 + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT - 8)
    header = len(text).to_bytes(8, "little") + text
    found = {name: _Place(len(header) + begin, shapes[name], dtype) for name, begin in places.items()}
    return header, found, header.index(_digits(0))


def _digits(tokens: int) -> bytes:
    return f"{tokens:0{_DIGITS}d}".encode()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and its length in bytes with the 8 that hold it."""
    with path.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        if count > path.stat().st_size:
            raise ValueError(f"a header of {count} bytes")
        header: dict[str, Any] = json.loads(file.read(count))
    return header, 8 + count
