"""Sample continuations of many inputs behind one shared prefix. Sequences leave the batch when they end.

    u ~ uniform(seed, input, how many equal inputs come before it, step)
    token = the first v with  Σ_{w ≤ v} softmax(logits / temperature)_w > u        (temperature 0: the argmax)

`generate` keeps a sequence in the batch until the last one has ended. Here a sequence that has ended makes room for
the next input, so that every token that goes through the model belongs to an answer.

Cost: M + n − 1 tokens through the model for an input of M tokens and an answer of n, and n rows of the head. Equal
inputs that join the batch at the same time share their M tokens. New inputs run packed where the attention backend is
good at that, otherwise padded on the right. A step waits for the device once, to read the tokens. The hidden states of
a continuation, `[n, d]`, stay in memory until it ends.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.families import text_config
from softprompt_kernels.models.finite import not_finite
from softprompt_kernels.models.forward import check_inputs, first_position, packs_batches, prefix_length, run_base
from softprompt_kernels.models.head import Head, head_of
from softprompt_kernels.models.padding import Packing, Placement
from softprompt_kernels.models.prepare import check_prepared
from softprompt_kernels.models.rows import NextTokens, OwnRows, PromptTokens
from softprompt_kernels.models.tap import FedTokens, QueryRecorder, QueryTap
from softprompt_kernels.prompts.offload import input_device
from softprompt_kernels.prompts.prefix import Prefix

_PREFILL_TOKENS = 1024
"""Tokens of new inputs that go through the model at once. An input that is longer goes alone."""

_REFILL = 8
"""New inputs join when 1 / `_REFILL` of the batch is free: few tokens at a time use the processor badly."""

_BLOCK = 256  # tokens whose probabilities are summed at once


@dataclass(frozen=True, eq=False)
class Continuation:
    """What was sampled for one input.

    Args:
        index: of the input.
        tokens: the n new tokens, with the end token if there is one.
        hidden: `[n, d]` in the model's dtype, the last hidden states that predicted them.
    """

    index: int
    tokens: tuple[int, ...]
    hidden: Tensor


def sample(
    model: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    prefix: Prefix | None,
    *,
    new_tokens: int,
    temperature: float = 1.0,
    end_tokens: Collection[int] = (),
    batch_size: int = 64,
    seed: int = 0,
    recorder: QueryRecorder | None = None,
) -> Iterator[Continuation]:
    """Continue each input after a prefix that all share, without top-k or top-p.

    What is sampled for an input depends on its tokens, the seed and how many equal inputs come before it, and not on
    `new_tokens`, other inputs, the batch size or any random state of the caller; these can change a token only by the
    rounding of its probabilities.

    Args:
        model: a prepared model with a head.
        inputs: token ids, at least one each. Any number.
        prefix: one row of keys and values; None for no prompt.
        new_tokens: at most so many tokens are added to an input.
        temperature: divides the logits; 0 takes the most probable token.
        end_tokens: a continuation ends with the first of these.
        batch_size: the largest number of inputs that are continued at a time.
        seed: of sampling, 0 or more.
        recorder: chooses tokens whose queries are watched; an input's index is the number of its sequence. None
            watches nothing.

    Returns:
        An iterator of continuations. Each comes when it has ended.

    Raises:
        SoftPromptError: an argument is out of range, the model is not prepared or has no head, the prefix belongs to
            another model, an input does not fit the model's window, or (from the iterator) logits are not finite.
    """
    check_prepared(model)
    for name, value, least in (("new_tokens", new_tokens, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise SoftPromptError(f"{name}: got {value}, accepted is {least} or more")
    if not 0 <= temperature < math.inf:
        raise SoftPromptError(f"temperature: got {temperature}, accepted is a finite number of 0 or more")
    if prefix is not None and prefix.rows != 1:
        raise SoftPromptError(f"prefix: got {prefix.rows} rows, accepted is one that all inputs share")
    for index, tokens in enumerate(inputs):
        if len(tokens) == 0:
            raise SoftPromptError(f"inputs[{index}]: got no tokens, accepted is at least one")
    head = head_of(model)
    if inputs:
        longest = max(map(len, inputs))
        check_inputs(model, torch.empty(1, longest, dtype=torch.int64, device="cpu"), prefix, None, None, new_tokens)
    ids = [tuple(tokens) for tokens in inputs]
    ends = frozenset(end_tokens)
    sampler = _Sampler(model, head, prefix, min(batch_size, len(ids)), new_tokens, temperature, ends, recorder)
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for index in sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i])):
        rows.append(_Row(index, ids[index], (seed, _digest(ids[index]), seen[ids[index]])))
        seen[ids[index]] += 1
    return sampler.run(rows)


def _digest(tokens: tuple[int, ...]) -> int:
    """A number of 64 bits that differs for different tokens."""
    return int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=8).digest(), "big")


@dataclass(eq=False)
class _Row:
    """One input, its new tokens with the hidden states `[d]` that predicted them, and its own random numbers."""

    index: int
    input: tuple[int, ...]
    seed: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random: np.random.Generator | None = None

    @property
    def cached(self) -> int:
        """Tokens in the cache between two steps: all but the last, which has not gone through the model."""
        return len(self.input) + len(self.tokens) - 1

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        if self._random is None:
            self._random = np.random.default_rng(self.seed)
        return self._random.random()


class _Sampler:
    """The rows in the batch, in the order of their rows of the cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        prefix: Prefix | None,
        batch_size: int,
        new_tokens: int,
        temperature: float,
        ends: frozenset[int],
        recorder: QueryRecorder | None,
    ) -> None:
        self.model, self.head, self.prefix, self.recorder = model, head, prefix, recorder
        self.batch_size, self.new_tokens, self.temperature, self.ends = batch_size, new_tokens, temperature, ends
        self.device = input_device(model)
        self.packs = packs_batches(model)
        self.rows: list[_Row] = []
        self.cache = OwnRows(batch_size)

    @torch.no_grad()
    def run(self, waiting: list[_Row]) -> Iterator[Continuation]:
        """Continue all rows. Rows of similar lengths should be neighbours, equal inputs too."""
        window: int | None = getattr(text_config(self.model), "sliding_window", None)
        own = max((len(row.input) for row in waiting), default=0) + self.new_tokens
        # With a window, rows of different lengths cost more attention (see `Placement`): they start together.
        together = window is not None and prefix_length(self.prefix) + own > window
        least = self.batch_size if together else -(-self.batch_size // _REFILL)
        start = 0
        while start < len(waiting) or self.rows:
            if self.batch_size - len(self.rows) >= least:
                while start < len(waiting) and len(self.rows) < self.batch_size:
                    new = self._next_group(waiting, start)
                    start += len(new)
                    self._append(new, self._prefill(new))
                    yield from self._remove_ended()
            if self.rows:
                self._append(self.rows, self._decode())
                yield from self._remove_ended()

    def _next_group(self, waiting: list[_Row], start: int) -> list[_Row]:
        """The next rows that join: what there is room for, of at most `_PREFILL_TOKENS` tokens."""
        group: list[_Row] = []
        distinct: set[tuple[int, ...]] = set()
        for row in waiting[start : start + self.batch_size - len(self.rows)]:
            distinct.add(row.input)
            if group and sum(map(len, distinct)) > _PREFILL_TOKENS:
                break
            group.append(row)
        return group

    def _prefill(self, new: list[_Row]) -> Tensor:
        """Run the inputs of new rows and add the rows. `[n, d]`: the hidden state of each row's last token."""
        self.cache.reserve(max(len(row.input) for row in new) + self.new_tokens - 1)
        numbers: dict[tuple[int, ...], int] = {}
        for row in new:
            numbers.setdefault(row.input, len(numbers))
        width = max(map(len, numbers))
        ids = torch.zeros(len(numbers), width, dtype=torch.int64, device="cpu")
        lengths = torch.tensor([len(x) for x in numbers], device="cpu")
        for number, tokens in enumerate(numbers):
            ids[number, : len(tokens)] = torch.tensor(tokens, device="cpu")
        mask = torch.arange(width, device="cpu") < lengths[:, None]
        packed = self.packs and not bool(mask.all())
        starts = lengths.cumsum(0) - lengths if packed else torch.arange(len(numbers), device="cpu") * width

        columns = [torch.arange(len(row.input), device="cpu") for row in new]
        first = len(self.rows)
        target = torch.cat([(first + i) * self.cache.columns + column for i, column in enumerate(columns)])
        source = torch.cat([starts[numbers[row.input]] + c for row, c in zip(new, columns, strict=True)])
        device = self.device
        sink = PromptTokens(self.cache, target.to(device), source.to(device))
        sharing: dict[tuple[int, ...], list[int]] = {}
        for row in new:
            sharing.setdefault(row.input, []).append(row.index)
        tap = self._tap([FedTokens(tuple(rows), x, 0, int(starts[numbers[x]])) for x, rows in sharing.items()])
        ids = ids.to(device)
        positions = first_position(self.prefix, None, ids)
        if packed:
            packing = Packing.of(mask, device)
            call = Call(self.prefix, packing=packing, sink=sink, tap=tap)
            ids, positions = packing.pack(ids), packing.pack(positions + packing.own_positions)
        else:
            call = Call(self.prefix, key_lengths=None if bool(mask.all()) else lengths.to(device), sink=sink, tap=tap)
            positions = positions + torch.arange(width, device=device)
        hidden = run_base(self.model, call, positions, input_ids=ids).flatten(0, 1)
        self.rows += new
        last = torch.stack([starts[numbers[row.input]] + len(row.input) - 1 for row in new])
        return hidden.index_select(0, last.to(hidden.device))

    def _decode(self) -> Tensor:
        """Run the last token of every row. `[n, d]`: its hidden state."""
        cached = [row.cached for row in self.rows]
        longest = max(cached) + 1
        step = torch.tensor([[row.tokens[-1] for row in self.rows], cached], device="cpu").to(self.device)
        ids, columns = step[0, :, None], step[1]
        target = torch.arange(len(cached), device=columns.device) * self.cache.columns + columns
        placement, lengths, padding = None, None, max(cached) - min(cached)
        if padding:
            lengths = columns + 1
            placement = Placement.at_row_ends(lengths, longest, 1, padding)  # used by layers with a window alone
        own = NextTokens(self.cache, target, longest)
        tap = self._tap(
            [
                FedTokens((r.index,), (r.tokens[-1],), c, i)
                for i, (r, c) in enumerate(zip(self.rows, cached, strict=True))
            ]
        )
        call = Call(self.prefix, key_lengths=lengths, placement=placement, own=own, tap=tap)
        positions = first_position(self.prefix, None, ids) + columns[:, None]
        return run_base(self.model, call, positions, input_ids=ids)[:, 0]

    def _tap(self, fed: list[FedTokens]) -> QueryTap | None:
        tap = None if self.recorder is None else self.recorder.tap(fed)
        return tap and replace(tap, tokens=tap.tokens.to(self.device))

    def _append(self, rows: list[_Row], hidden: Tensor) -> None:
        """Add the next token to each row, from its `hidden [n, d]`."""
        logits = self.head.logits(hidden)
        if self.temperature == 0:
            drawn = _most_probable(logits)
        else:
            uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device="cpu")
            drawn = _draw(logits, self.temperature, uniform.to(logits.device))
        for row, token, state in zip(rows, drawn.tolist(), hidden.unbind(), strict=True):
            if token < 0:
                raise not_finite(self.model, f"logits after inputs[{row.index}] and {len(row.tokens)} new tokens")
            row.tokens.append(token)
            row.hidden.append(state)

    def _remove_ended(self) -> list[Continuation]:
        """Take the rows that have ended out of the batch, and return what they got.

        The last rows take their places in the cache.
        """
        ended = [i for i, row in enumerate(self.rows) if self._has_ended(row)]
        if not ended:
            return []
        left = len(self.rows) - len(ended)
        leaving = set(ended)
        sources = [i for i in range(left, len(self.rows)) if i not in leaving]
        targets = [i for i in ended if i < left]
        self.cache.move(sources, targets)
        rows = [self.rows[i] for i in ended]
        found = [Continuation(row.index, tuple(row.tokens), torch.stack(row.hidden)) for row in rows]
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[left:]
        return found

    def _has_ended(self, row: _Row) -> bool:
        return len(row.tokens) == self.new_tokens or row.tokens[-1] in self.ends


def _most_probable(logits: Tensor) -> Tensor:
    """`[n]`: the argmax of `logits [n, V]`; −1 where it is not finite."""
    peak, token = logits.max(dim=-1)
    return token.where(peak.isfinite(), -1)


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """`[n]`: one token of each row of `softmax(logits / temperature)`; −1 where that is not finite.

    A block of tokens is found by the cumulative sum over blocks, then the token by that within the block. Both are
    float64: in fp32 the probabilities of rare tokens would be rounded to multiples of 6e-8. Only the sum of a block is
    in the dtype of the softmax.

    Args:
        logits: `[n, V]`.
        temperature: more than 0.
        uniform: `[n]` float64 in [0, 1).
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probabilities = (logits.to(dtype) / temperature).softmax(dim=-1)
    if missing := -logits.shape[1] % _BLOCK:
        probabilities = pad(probabilities, (0, missing))
    blocks = probabilities.unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1]
    block, rest = _first_above(sums, uniform * total)
    within = blocks[torch.arange(block.numel(), device=block.device), block].cumsum(dim=-1, dtype=torch.float64)
    offset, _ = _first_above(within, rest)
    token = block * _BLOCK + offset
    return token.where(total.isfinite(), -1)


def _first_above(sums: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `sums [n, m]`, which do not decrease, the first column above `number [n]`, and by how much the
    number exceeds the column before.

    A number that is the last sum or, by rounding, more counts as a little less. So the column found always adds
    something: a token of probability 0 is never drawn.
    """
    number = torch.minimum(number, sums[:, -1].nextafter(sums.new_zeros(())))
    # right: the first sum above the number. What adds nothing has the sum of the one before it.
    column = torch.searchsorted(sums, number[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = sums.gather(1, (column - 1).clamp(min=0)).where(column > 0, 0)
    return column[:, 0], number - before[:, 0]
