"""Rows for matching: what the teacher's layers asked and got while it read its own answers.

A row is one token in one layer: its queries, the result of the attention over context and own tokens, and the log of
the sum of its softmax. That is Hq·(D + Dv) numbers in the model's dtype and Hq in fp32, for each layer.

The tokens are a random subset of all that the teacher reads: as many as asked for, but at most `DISK_BYTES` in total. A
token counts once where several sequences begin alike: the opening of a chat, or two answers to one question.
Some rows are held out, to judge a fit to the others. They come from questions of their own.
They are written to disk as `rows-00000.safetensors`, … whenever `BUFFER_BYTES` are full, and read back one layer at a
time. `rows.json` is written last and holds a digest of everything the rows depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.models.attention import QueryTap, ScoreFunction
from softprompt_kernels.prompts import Prefix

BUFFER_BYTES = 64 << 20
HELDOUT_SHARE, MOST_HELDOUT = 0.1, 1024
DISK_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The rows of one layer, fp32.

    Args:
        query: `[Hq, n, D]` after the rotary embedding, at their positions behind the context.
        out: `[Hq, n, Dv]`, over all keys.
        lse: `[Hq, n]`, of all keys and the sink.
        offset: `[n]` int64, the position of a query minus C: 0 for the first token behind the context.
        scores: the layer's score function.
    """

    query: Tensor
    out: Tensor
    lse: Tensor
    offset: Tensor
    scores: ScoreFunction

    @property
    def count(self) -> int:
        """n."""
        return self.query.shape[1]

    def take(self, index: Tensor | slice) -> LayerRows:
        """Some of the rows."""
        return LayerRows(self.query[:, index], self.out[:, index], self.lse[:, index], self.offset[index], self.scores)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of all layers, on disk, in an order that is random but the same for all layers.

    Args:
        files: of the shards.
        scores: the score function of each layer.
        query_heads: Hq.
        order: `[n]` int64, a permutation.
        heldout: how many of the first rows are held out; their questions have no other rows.
    """

    files: tuple[Path, ...]
    scores: tuple[ScoreFunction, ...]
    query_heads: int
    order: Tensor
    heldout: int

    @property
    def count(self) -> int:
        """n, the rows of each layer."""
        return self.order.numel()

    def layer(self, index: int, device: torch.device) -> LayerRows:
        """The rows of one layer, read from disk."""
        parts: dict[str, list[Tensor]] = {"query": [], "out": [], "lse": [], "offset": []}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name, found in parts.items():
                    found.append(file.get_tensor(name if name == "offset" else f"{name}.{index}"))

        def by_head(name: str) -> Tensor:
            """`[n, Hq, ·]` of all shards to `[Hq, n, ·]`."""
            rows = torch.cat(parts.pop(name))[self.order].to(device, torch.float32)
            return rows.transpose(0, 1).contiguous()

        offset = torch.cat(parts["offset"])[self.order].to(device)
        return LayerRows(by_head("query"), by_head("out"), by_head("lse"), offset, self.scores[index])


class RowRecorder:
    """Records the rows of a random subset of the tokens of `examples`. A `QuerySink`.

    Args:
        folder: where the shards go. It exists.
        examples: all that the teacher will read.
        rows: how many tokens to record; all of them if there are fewer.
        row_bytes: bytes of one row in all layers.
        seed: of the choice.
    """

    def __init__(self, folder: Path, examples: Sequence[Example], rows: int, row_bytes: int, seed: int) -> None:
        self.folder, self.examples, self.row_bytes, self.seed = folder, examples, row_bytes, seed
        self.lengths = [example.length for example in examples]
        new = torch.tensor(_first_occurrences(examples)).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        wanted = min(rows, new.numel(), max(1, DISK_BYTES // row_bytes))
        chosen = torch.zeros(sum(self.lengths), dtype=torch.bool)
        chosen[new[torch.randperm(new.numel(), generator=generator)[:wanted]]] = True
        self.chosen = [part.nonzero().squeeze(1) for part in chosen.split(self.lengths)]
        numbers: dict[tuple[int, ...], int] = {}
        self.questions = [numbers.setdefault(example.input_ids, len(numbers)) for example in examples]
        self.scores: dict[int, ScoreFunction] = {}
        self.tensors: dict[str, list[Tensor]] = {}
        self.offsets: list[Tensor] = []
        self.asked: list[Tensor] = []
        self.buffered = self.count = self.shards = self.query_heads = 0

    def tap(self, group: Sequence[int]) -> QueryTap:
        """The tap for a right-padded batch of the examples with these indices. Call it before each batch."""
        if self.buffered * self.row_bytes >= BUFFER_BYTES:
            self._flush()
        width = max(self.lengths[index] for index in group)
        own = [self.chosen[index] for index in group]
        self.offsets.extend(own)
        self.asked.extend(torch.full_like(part, self.questions[index]) for index, part in zip(group, own, strict=True))
        self.buffered += sum(part.numel() for part in own)
        return QueryTap(torch.cat([row * width + part for row, part in enumerate(own)]), self)

    def tap_from(self, first: int) -> Callable[[Sequence[int]], QueryTap]:
        """`tap` for a part of the examples that begins with example `first`."""
        return lambda group: self.tap([first + index for index in group])

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
        """Store the rows of one layer of a batch."""
        self.scores[layer], self.query_heads = scores, query.shape[1]
        for name, tensor in (("query", query), ("out", out), ("lse", lse)):
            self.tensors.setdefault(f"{name}.{layer}", []).append(tensor.detach().cpu())

    def close(self, key: str) -> None:
        """Write what is buffered, and the index, which names the rows by `key`."""
        self._flush()
        scores = [asdict(self.scores[layer]) for layer in range(len(self.scores))]
        index = {
            "key": key,
            "shards": self.shards,
            "rows": self.count,
            "query_heads": self.query_heads,
            "seed": self.seed,
            "scores": scores,
        }
        write_text(_index(self.folder), json.dumps(index))

    def _flush(self) -> None:
        if not self.buffered:
            return
        if self.shards == 0:
            _index(self.folder).unlink(missing_ok=True)  # of an earlier recording, whose shards are now overwritten
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.tensors.items()}
        tensors |= {"offset": torch.cat(self.offsets), "question": torch.cat(self.asked)}
        save_file(tensors, _shard(self.folder, self.shards))
        self.count, self.shards, self.buffered = self.count + self.buffered, self.shards + 1, 0
        self.tensors, self.offsets, self.asked = {}, [], []


def enough_examples(examples: Sequence[Example], rows: int, seed: int) -> Sequence[Example]:
    """A random part of the examples with about twice as many tokens as rows; all of them if that is less."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, tokens = [], 0
    for index in order:
        if tokens >= 2 * rows:
            break
        chosen.append(examples[index])
        tokens += examples[index].length
    return chosen


def row_bytes(context: Prefix, query_heads: int) -> int:
    """Bytes of one row in all layers, for a model that computes in the dtype of the captured context."""
    size = sum(key.shape[3] + value.shape[3] for key, value in context.layers) * context.layers[0][0].element_size()
    return query_heads * (size + 4 * context.num_layers)


def read_rows(folder: Path, key: str) -> Rows | None:
    """The rows that were recorded in `folder` under this key; None if there are none or a file is damaged."""
    try:
        index: dict[str, Any] = json.loads(_index(folder).read_text(encoding="utf-8"))
        if index["key"] != key:
            return None
        files = tuple(_shard(folder, number) for number in range(index["shards"]))
        questions = torch.cat([_question(path) for path in files])
        order, heldout = _order(questions, index["seed"])
        scores = tuple(ScoreFunction(**one) for one in index["scores"])
        return Rows(files, scores, int(index["query_heads"]), order, heldout)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _question(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor("question")
    return found


def _order(questions: Tensor, seed: int) -> tuple[Tensor, int]:
    """A random order of rows in which all rows of some questions come first, and how many these are.

    They are about a tenth of the rows, but of at least one question. If there is only one, its rows are divided.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(questions.numel(), generator=generator)
    limit = min(MOST_HELDOUT, round(questions.numel() * HELDOUT_SHARE))
    counts = {question: count for question, count in enumerate(questions.bincount().tolist()) if count}
    if len(counts) == 1:
        return order, limit
    items = list(counts.items())
    heldout, taken = [], 0
    for index in torch.randperm(len(counts), generator=generator).tolist():
        question, count = items[index]
        if count <= limit - taken:
            heldout.append(question)
            taken += count
    if not heldout:
        heldout = [min(counts, key=lambda question: counts[question])]
    first = torch.isin(questions[order], torch.tensor(heldout))
    return torch.cat((order[first], order[~first])), int(first.sum())


def _first_occurrences(examples: Sequence[Example]) -> list[bool]:
    """For each token that the teacher reads, example by example: whether no earlier sequence has the same beginning."""
    known: dict[tuple[int, int], int] = {}
    found = []
    for example in examples:
        node = 0
        for token in (*example.input_ids, *example.output_ids[:-1]):
            child = known.get((node, token))
            found.append(child is None)
            node = known.setdefault((node, token), len(known) + 1)
    return found


def delete_rows(folder: Path) -> None:
    """Remove the index and all shards of a folder."""
    for path in (_index(folder), *folder.glob("rows-*.safetensors")):
        path.unlink(missing_ok=True)


def _index(folder: Path) -> Path:
    return folder / "rows.json"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.safetensors"
