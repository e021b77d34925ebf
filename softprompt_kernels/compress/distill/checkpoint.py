"""Checkpoints: the last states of a training, each in a file of its own.

    checkpoint.safetensors                  the newest
    checkpoint.before-1.safetensors, …      the one before it, and so on: `keep` files in all

A file holds the tensors of a state. Its metadata are the step, the identity of the run, a checksum of the tensors, and
notes of the caller. It is written under a temporary name. Then the older files move on by one name, and the new one
gets its own. So a kill at any moment, or a full disk, leaves the last state that was complete.

The names are fixed: no pattern of names decides which file is read, replaced or deleted. A newest file that is damaged
is not kept, and the one before it is read instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import replaced_when_complete

_OWN = ("step", "identity", "checksum")  # keys of the metadata that are not notes


class Checkpoint(NamedTuple):
    """A state of a training: the number of steps that it has behind it, its tensors, and what else decides the rest."""

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, str]


class Checkpoints:
    """The last checkpoints of a run.

    Args:
        path: of the newest. Those before it have names beside it.
        identity: of the run. The checkpoints of another one are refused.
        keep: how many to keep, 1 or more.
        reporter: is told of a damaged file.
    """

    def __init__(self, path: Path, identity: str, keep: int = 1, reporter: Reporter | None = None) -> None:
        self.path, self.identity, self.keep = path, identity, keep
        self.reporter = reporter or SilentReporter()
        self._newest: int | None = None  # the step of the newest file, if this process has read or written it

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and delete the oldest ones. One of the same step as the newest replaces it.

        Raises:
            OSError: it cannot be written. The checkpoints before are as they were.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        own = {"step": str(checkpoint.step), "identity": self.identity, "checksum": _checksum(tensors)}
        with replaced_when_complete(self.path, flush=True) as temporary:
            save_file(tensors, temporary, {**checkpoint.notes, **own})
            if self._newest not in (None, checkpoint.step):
                for number in reversed(range(self.keep - 1)):
                    if self._name(number).exists():
                        self._name(number).replace(self._name(number + 1))
        self._newest = checkpoint.step
        for path in self._older(self.keep):
            path.unlink(missing_ok=True)

    def read(self) -> Checkpoint | None:
        """The newest checkpoint that can be read; None if there is none at all. A damaged one is reported.

        Raises:
            SoftPromptError: all are damaged, or one belongs to another run.
        """
        damaged: list[tuple[Path, Exception]] = []
        for path in (self.path, *self._older(1)):
            try:
                found = read_checkpoint(path, self.identity)
            except FileNotFoundError:
                continue  # a kill between two renames
            except SoftPromptError:
                raise
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                damaged.append((path, error))
                continue
            self._newest = found.step if path == self.path else None
            for bad, reason in damaged:
                self.reporter.message(
                    f"Warning: {bad} is damaged ({reason}). Going on from the checkpoint before it, {path.name}."
                )
            return found
        if damaged:
            path, reason = damaged[0]
            raise SoftPromptError(f"checkpoint: {path} cannot be read ({reason}); delete it to start over") from reason
        return None

    def _name(self, number: int) -> Path:
        """Of the checkpoint so many before the newest."""
        return self.path.with_name(f"{self.path.stem}.before-{number}{self.path.suffix}") if number else self.path

    def _older(self, first: int) -> Iterator[Path]:
        """The files from the one `first` before the newest on, as far as they exist."""
        for path in map(self._name, count(first)):
            if not path.exists():
                return
            yield path


def read_checkpoint(path: Path, identity: str) -> Checkpoint:
    """The content of a file.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: it is missing or damaged.
        SoftPromptError: it belongs to another run.
    """
    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    if metadata.get("identity") != identity:
        raise SoftPromptError(f"checkpoint: {path} belongs to another run; delete it to start over")
    if metadata.get("checksum", _checksum(tensors)) != _checksum(tensors):  # files of older versions have none
        raise ValueError("its tensors have changed on the disk")
    return Checkpoint(int(metadata["step"]), tensors, {k: v for k, v in metadata.items() if k not in _OWN})


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of all bytes, in the order of the names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
