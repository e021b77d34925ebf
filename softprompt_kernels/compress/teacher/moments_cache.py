"""The teacher's targets for training, computed once and cached on disk.

With the forward KL and a linear head, the loss of a token needs the moments of the teacher's distribution: the mean row
of the head `m_t = E_{p_t}[W]` (d floats) and the entropy (1 float). They replace V logits without loss (see
ops/linear_kl_div). With a softcap, or another divergence, the cache holds the teacher's last hidden state instead. That
is also d floats and also exact, but costs one more GEMM with the head in every step. A loss that weights tokens by the
teacher's entropy keeps that too, or alone where it needs nothing else: it costs a GEMM with the head once.

On disk: `00000.safetensors`, … with the rows of examples in the order in which they came, and `index.json`,
which is written last. It says where the rows of each example are, and under which key: a digest of everything that they
depend on. With another model, context, set of examples or form they are computed again. Of many ranks each writes the
shards of its examples, which are numbered at the end, and all ranks read all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.parallel.files import number_files, own_file
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.models import Head
from softprompt_kernels.ops import TeacherMoments, kl_div, teacher_moments
from softprompt_kernels.output_file import replaced_when_complete

Form = Literal["moments", "hidden", "hidden_entropy", "entropy"]
"""What is kept for each token: moments (with the entropy), the last hidden state, that and the entropy, the entropy."""
ROWS_PER_SHARD = 4096
_EXAMPLES_PER_SHARD = 64  # of copied targets
_ENTROPY_ROWS = 256  # rows of logits in memory at once


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of all training examples, memory-mapped from disk.

    Args:
        form: what they are.
        shards: open files.
        rows: for each example, by its number, its shard, the first row there, and the row after the last.
        temperature: of the loss that moments and entropies were computed for.
        logit_scale, has_bias: of the head that the moments were computed with.
    """

    form: Form
    shards: tuple[Any, ...]
    rows: dict[int, tuple[int, int, int]]
    temperature: float
    logit_scale: float
    has_bias: bool

    def moments(self, examples: Sequence[int], device: torch.device) -> TeacherMoments:
        """The moments of the rows of several examples, concatenated in this order."""
        mean, entropy = self._gather("mean", examples, device), self._gather("entropy", examples, device)
        bias = self._gather("bias_mean", examples, device) if self.has_bias else None
        return TeacherMoments(mean, entropy, bias, self.temperature, self.logit_scale, None)

    def hidden(self, examples: Sequence[int], device: torch.device) -> Tensor:
        """`[n, d]`: the teacher's hidden states of several examples, concatenated in this order."""
        return self._gather("hidden", examples, device)

    def entropy(self, examples: Sequence[int], device: torch.device) -> Tensor:
        """`[n]` fp32: the teacher's entropies of the rows of several examples, nats. Not in the form "hidden"."""
        return self._gather("entropy", examples, device)

    def in_memory(self, most: int) -> Targets:
        """These targets, read into memory if they are files of at most `most` bytes: then no step reads the disk."""
        if any(isinstance(shard, _Shard) for shard in self.shards):
            return self
        names = {name for shard in self.shards for name in shard.keys()}  # noqa: SIM118 (not a mapping)
        size = sum(math.prod(shard.get_slice(name).get_shape()) * 4 for shard in self.shards for name in names)
        if size > most:
            return self
        return replace(self, shards=tuple(_Shard({n: shard.get_tensor(n) for n in names}) for shard in self.shards))

    def joined(self, others: Targets, offset: int) -> Targets:
        """These targets, and others of the same form under their numbers + `offset`."""
        first = len(self.shards)
        added = {offset + n: (first + shard, start, stop) for n, (shard, start, stop) in others.rows.items()}
        return replace(self, shards=self.shards + others.shards, rows=self.rows | added)

    def rows_of(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """All that is stored for the rows of several examples, by name, concatenated in this order, on the CPU."""
        names = sorted(self.shards[0].keys()) if self.shards else []
        return {name: self._gather(name, examples, torch.device("cpu")) for name in names}

    def _gather(self, name: str, examples: Sequence[int], device: torch.device) -> Tensor:
        parts = []
        for example in examples:
            shard, start, stop = self.rows[example]
            parts.append(self.shards[shard].get_slice(name)[start:stop])
        return torch.cat(parts).to(device)


class _Shard(NamedTuple):
    """A shard in memory."""

    tensors: dict[str, Tensor]

    def get_slice(self, name: str) -> Tensor:
        """As of an open file."""
        return self.tensors[name]


class TargetWriter:
    """Writes targets as the teacher's hidden states come in.

    Args:
        folder: where to. It is made.
        head: of the model.
        form: what to store for each token.
        temperature: of the loss.
    """

    def __init__(self, folder: Path, head: Head, form: Form, temperature: float) -> None:
        self.folder, self.head, self.form, self.temperature = folder, head, form, temperature
        self.hidden: list[Tensor] = []
        self.rows: dict[int, tuple[int, int, int]] = {}
        self.buffered = self.shards = 0

    def add(self, example: int, hidden: Tensor) -> None:
        """Store the targets of an example, from `hidden [n, d]`, the teacher's states that predict its output."""
        start, self.buffered = self.buffered, self.buffered + hidden.shape[0]
        self.rows[example] = self.shards, start, self.buffered
        self.hidden.append(hidden)
        if self.buffered >= ROWS_PER_SHARD:
            self._flush()

    def close(self, key: str) -> None:
        """Write what is buffered, and the index, which names the targets by `key`."""
        self._flush()
        first, shards = number_files(self.shards, partial(_shard, self.folder))
        rows = [(example, (first + shard, start, stop)) for example, (shard, start, stop) in self.rows.items()]
        every = [row for of_rank in ranks.gather(rows) for row in of_rank]
        if ranks.is_first():
            write_text(_index(self.folder), json.dumps({"key": key, "shards": shards, "rows": every}))
        ranks.barrier(_index(self.folder))

    def _flush(self) -> None:
        if not self.hidden:
            return
        if not self.shards:
            self.folder.mkdir(parents=True, exist_ok=True)
            _index(self.folder).unlink(missing_ok=True)  # of an earlier call, whose shards are now overwritten
        rows = _target_rows(torch.cat(self.hidden), self.head, self.form, self.temperature)
        with replaced_when_complete(own_file(_shard(self.folder, self.shards))) as temporary:
            save_file(rows, temporary)
        self.hidden, self.buffered, self.shards = [], 0, self.shards + 1


def copy_targets(targets: Targets, examples: Sequence[int], folder: Path, key: str) -> None:
    """Write the targets of some examples to another folder, under the numbers 0, 1, ….

    Args:
        targets: read from their folder.
        examples: their numbers there, in the new order.
        folder: where to. It is made.
        key: that `read_targets` asks for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _index(folder).unlink(missing_ok=True)
    rows, shards = [], 0
    for start in range(0, len(examples), _EXAMPLES_PER_SHARD):
        chosen, place = examples[start : start + _EXAMPLES_PER_SHARD], 0
        for number, example in enumerate(chosen, start):
            _, first, stop = targets.rows[example]
            rows.append((number, (shards, place, place + stop - first)))
            place += stop - first
        with replaced_when_complete(_shard(folder, shards)) as temporary:
            save_file(targets.rows_of(chosen), temporary)
        shards += 1
    write_text(_index(folder), json.dumps({"key": key, "shards": shards, "rows": rows}))


def read_targets(folder: Path, key: str, head: Head, form: Form, temperature: float) -> Targets | None:
    """The targets that were written to `folder` under this key; None if there are none or a file is damaged."""
    try:
        index: dict[str, Any] = json.loads(_index(folder).read_text(encoding="utf-8"))
        if index["key"] != key:
            return None
        shards = tuple(safe_open(_shard(folder, number), framework="pt") for number in range(index["shards"]))
        rows = {int(example): (int(shard), int(start), int(stop)) for example, (shard, start, stop) in index["rows"]}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return Targets(form, shards, rows, temperature, head.logit_scale, head.bias is not None)


def row_entropies(logits: Tensor) -> Tensor:
    """`[n]`: the entropies of the rows of logits `[n, V]`, nats: H(p) = ln V − KL(p ‖ uniform)."""
    return math.log(logits.shape[1]) - kl_div(torch.zeros_like(logits), logits, reduction="none")


def _target_rows(hidden: Tensor, head: Head, form: Form, temperature: float) -> dict[str, Tensor]:
    if form != "moments":
        tensors = {"hidden": hidden.cpu().contiguous()} if form != "entropy" else {}
        return tensors if form == "hidden" else tensors | {"entropy": _entropy(hidden, head, temperature).cpu()}
    moments = teacher_moments(
        hidden, head.weight, bias=head.bias, logit_scale=head.logit_scale, temperature=temperature, group=head.group
    )
    tensors = {"mean": moments.mean.cpu(), "entropy": moments.entropy.cpu()}
    if moments.bias_mean is not None:
        tensors["bias_mean"] = moments.bias_mean.cpu()
    return tensors


def _entropy(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """`[n]` fp32: the entropies at a temperature of the tokens after `hidden [n, d]`."""
    parts = (head.logits(rows).float() / temperature for rows in hidden.split(_ENTROPY_ROWS))
    return torch.cat([row_entropies(logits) for logits in parts])


def _index(folder: Path) -> Path:
    return folder / "index.json"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
