"""The teacher's targets for training, computed once and cached on disk.

With the forward KL and a linear head, the loss of a token needs the moments of the teacher's distribution: the mean row
of the head `m_t = E_{p_t}[W]` (d floats) and the entropy (1 float). They replace V logits without loss (see
ops/linear_kl_div). With a softcap, or another divergence, the cache holds the teacher's last hidden state instead. That
is also d floats and also exact, but costs one more GEMM with the head in every step.

On disk: `targets-00000.safetensors`, … with the rows of consecutive examples, and `index.json`, which is written last
and holds a digest of everything the targets depend on. With another model, context, set of examples or form they are
computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teacher.rows import RowRecorder
from softprompt_kernels.models import Head
from softprompt_kernels.ops import TeacherMoments, teacher_moments
from softprompt_kernels.prompts import Prefix

Form = Literal["moments", "hidden"]
EXAMPLES_PER_SHARD = 64
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of all training examples, memory-mapped from disk.

    Args:
        form: "moments" or "hidden".
        shards: open files, each with the rows of `EXAMPLES_PER_SHARD` examples.
        rows: for each example the first row within its shard, and the row after the last.
        temperature: of the loss that the moments were computed for.
        logit_scale, has_bias: of the head that the moments were computed with.
    """

    form: Form
    shards: tuple[Any, ...]
    rows: tuple[tuple[int, int], ...]
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

    def _gather(self, name: str, examples: Sequence[int], device: torch.device) -> Tensor:
        parts = []
        for example in examples:
            start, stop = self.rows[example]
            parts.append(self.shards[example // EXAMPLES_PER_SHARD].get_slice(name)[start:stop])
        return torch.cat(parts).to(device)


def cached_targets(
    folder: Path,
    identity: dict[str, Any],
    model: PreTrainedModel,
    head: Head,
    prefix: Prefix,
    examples: Sequence[Example],
    *,
    form: Form,
    temperature: float,
    reporter: Reporter,
    recorder: RowRecorder | None = None,
) -> Targets:
    """The targets of `examples`, read from `folder`, or computed and saved there.

    Args:
        folder: created if it does not exist.
        identity: a JSON-able description of model and context. Examples, form and temperature are added to it.
        model, head: the model and its head.
        prefix: the teacher's prefix.
        examples: the training set. `Targets` uses the indices of this order.
        form: what to store for each token.
        temperature: of the loss.
        reporter: receives the progress.
        recorder: also records rows of these examples. Then the teacher reads them even where the targets are cached.
    """
    key = _digest({"format": _FORMAT, **identity, "form": form, "temperature": temperature}, examples)
    index = folder / "index.json"
    paths = [folder / f"targets-{i:05d}.safetensors" for i in range(-(-len(examples) // EXAMPLES_PER_SHARD))]
    complete = _is_complete(index, key, paths)
    if not complete:
        index.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(paths):
        if complete and recorder is None:
            break
        first = i * EXAMPLES_PER_SHARD
        part = examples[first : first + EXAMPLES_PER_SHARD]
        stage = f"Teacher's targets, part {i + 1} of {len(paths)}"
        tap = None if recorder is None else recorder.tap_from(first)
        rows = torch.cat(hidden_states(model, prefix, part, reporter, stage, tap=tap))
        if not complete:
            save_file(_target_rows(rows, head, form, temperature), path)
    if not complete:
        write_text(index, json.dumps({"key": key}))
    shards = tuple(safe_open(path, framework="pt") for path in paths)
    return Targets(form, shards, _rows(examples), temperature, head.logit_scale, head.bias is not None)


def _target_rows(hidden: Tensor, head: Head, form: Form, temperature: float) -> dict[str, Tensor]:
    if form == "hidden":
        return {"hidden": hidden.cpu().contiguous()}
    moments = teacher_moments(
        hidden, head.weight, bias=head.bias, logit_scale=head.logit_scale, temperature=temperature
    )
    tensors = {"mean": moments.mean.cpu(), "entropy": moments.entropy.cpu()}
    if moments.bias_mean is not None:
        tensors["bias_mean"] = moments.bias_mean.cpu()
    return tensors


def _rows(examples: Sequence[Example]) -> tuple[tuple[int, int], ...]:
    rows, start = [], 0
    for index, example in enumerate(examples):
        start = 0 if index % EXAMPLES_PER_SHARD == 0 else start
        rows.append((start, start + example.targets))
        start += example.targets
    return tuple(rows)


def _digest(identity: dict[str, Any], examples: Sequence[Example]) -> str:
    hasher = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for example in examples:
        hasher.update(repr((example.input_ids, example.output_ids)).encode())
    return hasher.hexdigest()


def _is_complete(index: Path, key: str, paths: Sequence[Path]) -> bool:
    """Whether the folder holds exactly these targets and every file is readable."""
    try:
        if json.loads(index.read_text())["key"] != key:
            return False
        for path in paths:
            safe_open(path, framework="pt")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return True
