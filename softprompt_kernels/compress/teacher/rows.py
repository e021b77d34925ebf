"""Rows for matching: what the teacher's layers asked and got while it wrote its answers, or read given ones.

A row is one token in one layer: its queries, the result of the attention over context and own tokens, and the log of
the sum of its softmax. That is Hq·(D + Dv) numbers in the model's dtype and Hq in fp32, for each layer.

The tokens are a random subset of all that the teacher reads or writes. How many that will be is not known before the
teacher has answered, so each token has a priority, and those with the lowest are the rows:

    priority(token) = hash(seed, the sequence up to this token)        rows = the n tokens of lowest priority

A token is recorded when its priority is among the lowest so far, and later ones may displace it. The choice depends on
the sequences and the seed, but not on their order or batches. A token counts once where several sequences begin alike:
the opening of a chat, or two answers to one question. It then belongs to the question that came first.
Some rows are held out, to judge a fit to the others. They come from questions of their own.
Rows are written to disk as `rows-00000.safetensors`, … whenever `BUFFER_BYTES` are full, and read back one layer at a
time. `rows.json` is written last and holds a digest of everything the rows depend on. Displaced rows are deleted when
the disk holds `DISK_BYTES`, and at the end. Of many ranks each records what it reads and writes. At the end they
compare priorities, and keep the rows that one process would have kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.parallel.files import number_files, own_file
from softprompt_kernels.compress.parallel.teams import ALONE, Team
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.models import FedTokens, QueryTap, ScoreFunction
from softprompt_kernels.output_file import replaced_when_complete
from softprompt_kernels.prompts import Prefix

BUFFER_BYTES = 64 << 20
HELDOUT_SHARE, MOST_HELDOUT = 0.1, 1024
DISK_BYTES = 8 << 30
_SLACK = 1.25  # displaced rows are found when there are so many times as many as wanted


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The rows of one layer, fp32.

    Args:
        query: `[Hq, n, D]` after the rotary embedding, at their positions behind the context.
        out: `[Hq, n, Dv]`, over all keys.
        lse: `[Hq, n]`, of all keys and the sink.
        offset: `[n]` int64, the position of a query minus C: 0 for the first token behind the context.
        scores: the layer's score function.
        team: of ranks that share the rows of the layer; these are n of them.
        total: how many rows the team has; None: n.
    """

    query: Tensor
    out: Tensor
    lse: Tensor
    offset: Tensor
    scores: ScoreFunction
    team: Team = ALONE
    total: int | None = None

    @property
    def count(self) -> int:
        """n."""
        return self.query.shape[1]

    def take(self, index: Tensor | slice) -> LayerRows:
        """Some of the rows."""
        query, out, lse = (tensor[:, index] for tensor in (self.query, self.out, self.lse))
        return replace(self, query=query, out=out, lse=lse, offset=self.offset[index])

    def mean_square(self) -> Tensor:
        """`[Hq]`: the mean of ‖out‖² over all rows of the team."""
        squares = self.out.square().sum(-1)
        if self.total is None:
            return squares.mean(-1)
        found = squares.sum(-1)
        self.team.sum_([found])
        return found / self.total


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of all layers, on disk, in an order that is random but the same for all layers.

    Args:
        files: of the shards.
        scores: the score function of each layer.
        query_heads: Hq.
        order: `[n]` int64, the place of each row in the files.
        heldout: how many of the first rows are held out; their questions have no other rows.
        team: of ranks that share the rows of a layer.
    """

    files: tuple[Path, ...]
    scores: tuple[ScoreFunction, ...]
    query_heads: int
    order: Tensor
    heldout: int
    team: Team = ALONE

    @property
    def count(self) -> int:
        """n, the rows of each layer."""
        return self.order.numel()

    def layer(self, index: int, device: torch.device) -> LayerRows:
        """The rows of one layer, read from disk: those of this rank."""
        team = self.team
        order = self.order[team.rank :: team.size]
        parts: dict[str, list[Tensor]] = {"query": [], "out": [], "lse": [], "offset": []}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name, found in parts.items():
                    found.append(file.get_tensor(name if name == "offset" else f"{name}.{index}"))

        def by_head(name: str) -> Tensor:
            """`[n, Hq, ·]` of all shards to `[Hq, n, ·]`."""
            rows = torch.cat(parts.pop(name))[order].to(device, torch.float32)
            return rows.transpose(0, 1).contiguous()

        offset = torch.cat(parts["offset"])[order].to(device)
        total = None if team.size == 1 else self.count
        return LayerRows(by_head("query"), by_head("out"), by_head("lse"), offset, self.scores[index], team, total)


class RowRecorder:
    """Records the rows of a random subset of the tokens that it is told of. A `QueryRecorder` and a `QuerySink`.

    Args:
        folder: where the shards go. It exists.
        rows: how many tokens to record; all of them if there are fewer.
        row_bytes: bytes of one row in all layers.
        seed: of the choice.
    """

    def __init__(self, folder: Path, rows: int, row_bytes: int, seed: int) -> None:
        self.folder, self.row_bytes, self.seed = folder, row_bytes, seed
        self.wanted = max(1, min(rows, DISK_BYTES // (2 * row_bytes)))
        self.limit = 2**63 - 1  # no token of a higher priority becomes a row
        self.priorities: dict[int, int] = {}  # of what is recorded and not displaced, with the number of its sequence
        self.beginnings: dict[int, tuple[bytes, int]] = {}  # by sequence: its hash so far, and its question
        self.scores: dict[int, ScoreFunction] = {}
        self.tensors: dict[str, list[Tensor]] = {}
        self.tokens: list[tuple[int, int, int]] = []  # offset, question and priority of each buffered row
        self.shards: list[int] = []  # rows of each
        self.query_heads = 0
        if ranks.world() > 1:  # what an earlier call recorded goes before any rank writes
            if ranks.is_first():
                delete_rows(folder)
            ranks.barrier()

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap | None:
        """The tap for those of these tokens that are recorded. The first tokens of a sequence are its question."""
        if len(self.tokens) * self.row_bytes >= BUFFER_BYTES:
            self._flush()
        found: list[tuple[int, int, int, int]] = []  # place, offset, question and priority
        for part in fed:
            first = len(found)
            if part.start:
                state, question = self.beginnings[part.sequences[0]]
            else:
                state, question = hashlib.blake2b(repr(self.seed).encode(), digest_size=8).digest(), 0
            for index, token in enumerate(part.tokens):
                state = hashlib.blake2b(state + token.to_bytes(8, "little"), digest_size=8).digest()
                priority = _priority(state)
                if priority <= self.limit and priority not in self.priorities:
                    self.priorities[priority] = part.sequences[0]
                    found.append((part.place + index, part.start + index, question, priority))
            if not part.start:
                question = _priority(state)
                found[first:] = [(place, offset, question, priority) for place, offset, _, priority in found[first:]]
            self.beginnings.update((sequence, (state, question)) for sequence in part.sequences)
        if len(self.priorities) > _SLACK * self.wanted:
            self._displace()
        found = [one for one in found if one[3] <= self.limit]
        self.tokens += (one[1:] for one in found)
        return QueryTap(torch.tensor([one[0] for one in found]), self) if found else None

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
        """Store the rows of one layer of a batch."""
        self.scores[layer], self.query_heads = scores, query.shape[1]
        for name, tensor in (("query", query), ("out", out), ("lse", lse)):
            self.tensors.setdefault(f"{name}.{layer}", []).append(tensor.detach())

    def close(self, key: str, turns: Mapping[int, int] | None = None) -> None:
        """Write what is buffered, and the index, which names the rows by `key`.

        Args:
            key: as in `read_rows`.
            turns: by the number of a sequence, its place in the order in which one process sees all of them. Many ranks
                need it.
        """
        self._flush()
        self._displace()
        count = self._leave_to_others(turns)
        self._drop_displaced()
        _, shards = number_files(len(self.shards), partial(_shard, self.folder))
        scores = [asdict(self.scores[layer]) for layer in range(len(self.scores))]
        # A rank that has recorded nothing knows no heads.
        query_heads, scores = max(ranks.gather((self.query_heads, scores)), key=lambda known: known[0])
        index = {
            "key": key,
            "shards": shards,
            "rows": count,
            "query_heads": query_heads,
            "seed": self.seed,
            "scores": scores,
        }
        if ranks.is_first():
            write_text(_index(self.folder), json.dumps(index))
        ranks.barrier(_index(self.folder))

    def _leave_to_others(self, turns: Mapping[int, int] | None) -> int:
        """Give up what other ranks keep. Returns how many rows all of them keep."""
        if turns is None or ranks.world() == 1:
            return len(self.priorities)
        own = [(priority, turns[sequence]) for priority, sequence in self.priorities.items()]
        keepers: dict[int, tuple[int, int]] = {}  # by priority: the turn and the rank that come first
        for number, of_rank in enumerate(ranks.gather(own)):
            for priority, turn in of_rank:
                keepers[priority] = min((turn, number), keepers.get(priority, (turn, number)))
        lowest = sorted(keepers)[: self.wanted]
        kept = {priority for priority in lowest if keepers[priority][1] == ranks.rank()}
        self.priorities = {priority: n for priority, n in self.priorities.items() if priority in kept}
        return len(lowest)

    def _flush(self) -> None:
        if not self.tokens:
            return
        if not self.shards and ranks.world() == 1:
            delete_rows(self.folder)  # of an earlier recording
        tensors = {name: torch.cat(parts) for name, parts in self.tensors.items()}
        tensors |= dict(zip(("offset", "question", "priority"), torch.tensor(self.tokens).T.contiguous(), strict=True))
        self.shards.append(_write_shard(own_file(_shard(self.folder, len(self.shards))), tensors, self.priorities))
        self.tensors, self.tokens = {}, []
        if sum(self.shards) * self.row_bytes > DISK_BYTES:
            self._drop_displaced()

    def _displace(self) -> None:
        """Keep the lowest priorities."""
        self.priorities = {priority: self.priorities[priority] for priority in sorted(self.priorities)[: self.wanted]}
        self.limit = max(self.priorities, default=self.limit)

    def _drop_displaced(self) -> None:
        """Delete displaced rows from the disk."""
        if sum(self.shards) > len(self.priorities):
            paths = [own_file(_shard(self.folder, number)) for number in range(len(self.shards))]
            self.shards = [_write_shard(path, load_file(path), self.priorities) for path in paths]


def _write_shard(path: Path, tensors: dict[str, Tensor], priorities: Collection[int]) -> int:
    """Write the rows of these priorities; returns how many these are."""
    kept = torch.isin(tensors["priority"], torch.tensor(list(priorities), dtype=torch.int64))
    with replaced_when_complete(path) as temporary:
        save_file({name: rows[kept.to(rows.device)].cpu() for name, rows in tensors.items()}, temporary)
    return int(kept.sum())


def _priority(state: bytes) -> int:
    """63 bits of a hash."""
    return int.from_bytes(state, "little") >> 1


def enough_examples(examples: Sequence[Example], rows: int, seed: int) -> list[int]:
    """The indices of a random part of the examples with about twice as many tokens as rows; of all if that is less."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, tokens = [], 0
    for index in order:
        if tokens >= 2 * rows:
            break
        chosen.append(index)
        tokens += examples[index].length
    return chosen


def row_bytes(context: Prefix, query_heads: int, dtype: torch.dtype) -> int:
    """Bytes of one row in all layers, for a model that computes in this dtype."""
    size = sum(key.shape[3] + value.shape[3] for key, value in context.layers) * dtype.itemsize
    return query_heads * (size + 4 * context.num_layers)


def read_rows(folder: Path, key: str) -> Rows | None:
    """The rows that were recorded in `folder` under this key; None if there are none or a file is damaged."""
    try:
        index: dict[str, Any] = json.loads(_index(folder).read_text(encoding="utf-8"))
        if index["key"] != key:
            return None
        files = tuple(_shard(folder, number) for number in range(index["shards"]))
        priorities, questions = (
            torch.cat([_tensor(path, name) for path in files]) for name in ("priority", "question")
        )
        order = priorities.argsort()[: index["rows"]]  # random, as the priorities are
        first, heldout = _held_out_first(questions[order], index["seed"])
        order = order[first]
        scores = tuple(ScoreFunction(**one) for one in index["scores"])
        return Rows(files, scores, int(index["query_heads"]), order, heldout)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


def _held_out_first(questions: Tensor, seed: int) -> tuple[Tensor, int]:
    """The indices of rows with these questions, those of held-out questions first, and how many these are.

    They are about a tenth of the rows, but of at least one question. If there is only one, its rows are divided.
    """
    limit = min(MOST_HELDOUT, round(questions.numel() * HELDOUT_SHARE))
    numbers, counts = (found.tolist() for found in questions.unique(return_counts=True))
    if len(counts) == 1:
        return torch.arange(questions.numel()), limit
    heldout, taken = [], 0
    for index in torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist():
        if counts[index] <= limit - taken:
            heldout.append(numbers[index])
            taken += counts[index]
    if not heldout:
        heldout = [numbers[counts.index(min(counts))]]
    first = torch.isin(questions, torch.tensor(heldout))
    return torch.cat((first.nonzero(), (~first).nonzero())).squeeze(1), int(first.sum())


def delete_rows(folder: Path) -> None:
    """Remove the index and all shards of a folder."""
    for path in (_index(folder), *folder.glob("rows-*")):
        path.unlink(missing_ok=True)


def _index(folder: Path) -> Path:
    return folder / "rows.json"


def _shard(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.safetensors"
