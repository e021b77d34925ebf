"""Sequences that are continued together behind a bank of prompts. They join and leave the batch at any step.

    join(rows)    the inputs of new rows go through the model, and each row gets its first token
    step()        the last token of every row goes through the model, and each row gets one more
    leave(rows)   rows that have ended make room for others

`sample` uses it for one shared prefix, and `softprompt serve` for many prompts and requests. Who calls decides when a
row has ended. Nothing that a row gets depends on the rows beside it, except by the rounding of its logits.

Cost: M + n − 1 tokens through the model for an input of M tokens and n new ones, and n rows of the head. Equal inputs
behind the same prompt that join together share their M tokens. New inputs run packed where the attention backend is
good at that, otherwise padded on the right. A step waits for the device once, to read the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.decode.draw import next_tokens
from softprompt_kernels.models.decode.rows import NextTokens, OwnRows, PromptTokens
from softprompt_kernels.models.families import max_positions, text_config
from softprompt_kernels.models.forward import first_position, packs_batches, prefix_length, run_base
from softprompt_kernels.models.head import head_of
from softprompt_kernels.models.padding import Packing, Placement
from softprompt_kernels.models.tap import FedTokens, QueryRecorder, QueryTap
from softprompt_kernels.prompts.offload import input_device
from softprompt_kernels.prompts.prefix import Prefix

_PREFILL_TOKENS = 1024
"""Tokens of new inputs that go through the model at once. An input that is longer goes alone."""

Key = tuple[int, tuple[int, ...]]  # a prompt and an input


@dataclass(frozen=True)
class TokenScore:
    """The log-probabilities of one new token, at temperature 1, in nats.

    Args:
        logprob: of the token.
        top: the most probable tokens with theirs, the most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class DecodingRow:
    """One input, how it is continued, and what it got so far.

    Args:
        input: token ids, at least one.
        prompt: the row of the bank that it reads.
        seed: of its random numbers, any number of integers of 0 or more.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: from 0 to 1; a token is drawn from the most probable ones that together have this probability.
        top_scores: how many of the most probable tokens are scored at each step, 0 or more; None scores no token.
        index: the number that a recorder knows it by.
        tokens: the new tokens.
        hidden: `[d]` in the model's dtype for each new token, the state that predicted it, if the batch keeps them.
        scores: one for each new token, if `top_scores` is not None.
        failed: the logits behind the last token were not finite. The row gets no more tokens and has to leave.
    """

    input: tuple[int, ...]
    prompt: int = 0
    seed: tuple[int, ...] = (0,)
    temperature: float = 1.0
    top_p: float = 1.0
    top_scores: int | None = None
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        self._random: np.random.Generator | None = None

    @property
    def key(self) -> Key:
        """What rows that can share the run of their input have in common."""
        return self.prompt, self.input

    @property
    def cached(self) -> int:
        """Tokens in the cache between two steps: all but the last, which has not gone through the model."""
        return len(self.input) + len(self.tokens) - 1

    def uniform(self) -> float:
        """The next random number in [0, 1); 0 for a row that takes the most probable token."""
        if self.temperature == 0:
            return 0.0
        if self._random is None:
            self._random = np.random.default_rng(self.seed)
        return self._random.random()


class DecodingBatch:
    """The rows that are continued together, in the order of their rows of the cache.

    One thread at a time may use a batch, and no graph is made.

    Args:
        model: a prepared model with a head.
        prefix: the bank of prompts, with R rows; None for no prompt.
        size: the largest number of rows at a time.
        longest: tokens that the longest row will have, which bounds the cache; None: no more than its rows need.
        recorder: watches the tokens that go through the model; None watches nothing.
        keep_hidden: whether rows keep the hidden states of their new tokens.

    Raises:
        SoftPromptError: the model is not prepared or has no head, or `size` is below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Prefix | None,
        size: int,
        *,
        longest: int | None = None,
        recorder: QueryRecorder | None = None,
        keep_hidden: bool = False,
    ) -> None:
        if size < 1:
            raise SoftPromptError(f"size: got {size}, accepted is 1 or more")
        self.model, self.prefix, self.size, self.recorder = model, prefix, size, recorder
        self.longest = longest
        self.head, self.keep_hidden = head_of(model), keep_hidden
        self.device = input_device(model)
        self.packs = packs_batches(model)
        self.rows: list[DecodingRow] = []
        self.cache = OwnRows(size)

    @property
    def free(self) -> int:
        """How many rows can join."""
        return self.size - len(self.rows)

    def room(self, prompt: int) -> int:
        """How many tokens of input and answer together fit into the model's window.

        Args:
            prompt: the row of the bank that stands before them.
        """
        ragged = None if self.prefix is None else self.prefix.lengths
        length = prefix_length(self.prefix) if ragged is None else int(ragged[prompt])
        return max_positions(text_config(self.model)) - length

    def fitting(self, waiting: Iterable[DecodingRow]) -> int:
        """How many of the first `waiting` rows join next: what there is room for, of not too many tokens at once."""
        count, tokens, distinct = 0, 0, set[Key]()
        for row in waiting:
            tokens += 0 if row.key in distinct else len(row.input)
            distinct.add(row.key)
            if count == self.free or (count and tokens > _PREFILL_TOKENS):
                break
            count += 1
        return count

    @torch.no_grad()
    def join(self, new: Sequence[DecodingRow]) -> None:
        """Run the inputs of new rows, and give each its first token. If that raises, none of them has joined.

        Args:
            new: one or more, no more than `free`. Input and answer must fit into `room`.

        Raises:
            SoftPromptError: more rows than are free, or a row without input, or of a prompt that is not in the bank.
        """
        if not 0 < len(new) <= self.free:
            raise SoftPromptError(f"new: got {len(new)} rows, accepted is 1 to {self.free}")
        prompts = 1 if self.prefix is None else self.prefix.rows
        for index, row in enumerate(new):
            if not row.input or not 0 <= row.prompt < prompts:
                raise SoftPromptError(
                    f"new[{index}]: got {len(row.input)} tokens behind prompt {row.prompt}, accepted is one token or "
                    f"more behind prompt 0 to {prompts - 1}"
                )
        self._append(new, self._prefill(new))
        self.rows += new

    @torch.no_grad()
    def step(self) -> None:
        """Give every row one more token. Rows that have ended should have left."""
        if self.rows:
            self._append(self.rows, self._decode())

    def leave(self, rows: Iterable[DecodingRow]) -> None:
        """Take rows out of the batch. The last rows of the batch take their places in the cache.

        Args:
            rows: any number; those that are not in the batch are passed over.
        """
        leaving = {id(row) for row in rows}
        ended = [i for i, row in enumerate(self.rows) if id(row) in leaving]
        if not ended:
            return
        left = len(self.rows) - len(ended)
        places = set(ended)
        sources = [i for i in range(left, len(self.rows)) if i not in places]
        targets = [i for i in ended if i < left]
        self.cache.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[left:]

    def clear(self) -> None:
        """Take all rows out, and give the memory of the cache back."""
        self.rows, self.cache = [], OwnRows(self.size)

    def _prefill(self, new: Sequence[DecodingRow]) -> Tensor:
        """Run the inputs of new rows into the cache. `[n, d]`: the hidden state of each row's last token."""
        self._reserve(max(len(row.input) for row in new))
        numbers: dict[Key, int] = {}
        for row in new:
            numbers.setdefault(row.key, len(numbers))
        inputs = [tokens for _, tokens in numbers]
        width = max(map(len, inputs))
        ids = torch.zeros(len(inputs), width, dtype=torch.int64, device="cpu")
        lengths = torch.tensor([len(x) for x in inputs], device="cpu")
        for number, tokens in enumerate(inputs):
            ids[number, : len(tokens)] = torch.tensor(tokens, device="cpu")
        mask = torch.arange(width, device="cpu") < lengths[:, None]
        packed = self.packs and not bool(mask.all())
        starts = lengths.cumsum(0) - lengths if packed else torch.arange(len(inputs), device="cpu") * width

        columns = [torch.arange(len(row.input), device="cpu") for row in new]
        first = len(self.rows)
        target = torch.cat([(first + i) * self.cache.columns + column for i, column in enumerate(columns)])
        source = torch.cat([starts[numbers[row.key]] + c for row, c in zip(new, columns, strict=True)])
        device = self.device
        sink = PromptTokens(self.cache, target.to(device), source.to(device))
        sharing: dict[Key, list[int]] = {}
        for row in new:
            sharing.setdefault(row.key, []).append(row.index)
        tap = self._tap([FedTokens(tuple(rows), x[1], 0, int(starts[numbers[x]])) for x, rows in sharing.items()])
        ids = ids.to(device)
        index = self._prompt_index([prompt for prompt, _ in numbers])
        positions = first_position(self.prefix, index, ids)
        if packed:
            packing = Packing.of(mask, device)
            call = Call(self.prefix, index, packing=packing, sink=sink, tap=tap)
            ids, positions = packing.pack(ids), packing.pack(positions + packing.own_positions)
        else:
            own = None if bool(mask.all()) else lengths.to(device)
            call = Call(self.prefix, index, key_lengths=own, sink=sink, tap=tap)
            positions = positions + torch.arange(width, device=device)
        hidden = run_base(self.model, call, positions, input_ids=ids).flatten(0, 1)
        last = torch.stack([starts[numbers[row.key]] + len(row.input) - 1 for row in new])
        return hidden.index_select(0, last.to(hidden.device))

    def _decode(self) -> Tensor:
        """Run the last token of every row. `[n, d]`: its hidden state."""
        cached = [row.cached for row in self.rows]
        longest = max(cached) + 1
        self._reserve(longest)
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
        index = self._prompt_index([row.prompt for row in self.rows])
        call = Call(self.prefix, index, key_lengths=lengths, placement=placement, own=own, tap=tap)
        positions = first_position(self.prefix, index, ids) + columns[:, None]
        return run_base(self.model, call, positions, input_ids=ids)[:, 0]

    def _reserve(self, columns: int) -> None:
        """Room for rows of `columns` tokens. It doubles up to `longest`, so that growing rows are seldom copied."""
        if columns > self.cache.columns:
            doubled = 2 * self.cache.columns
            self.cache.reserve(max(columns, doubled if self.longest is None else min(doubled, self.longest)))

    def _prompt_index(self, prompts: Sequence[int]) -> Tensor | None:
        """`[n]` int64: which prompt each of n sequences reads; None where all share the only one."""
        if self.prefix is None or self.prefix.rows == 1:
            return None
        return torch.tensor(prompts, device="cpu").to(self.device)

    def _tap(self, fed: list[FedTokens]) -> QueryTap | None:
        tap = None if self.recorder is None else self.recorder.tap(fed)
        return tap and replace(tap, tokens=tap.tokens.to(self.device))

    def _append(self, rows: Sequence[DecodingRow], hidden: Tensor) -> None:
        """Add the next token to each row, from its `hidden [n, d]`."""
        logits = self.head.logits(hidden)
        uniform = [row.uniform() for row in rows]
        drawn = next_tokens(logits, [row.temperature for row in rows], [row.top_p for row in rows], uniform).tolist()
        self._score(rows, drawn, logits)
        for row, token, state in zip(rows, drawn, hidden.unbind(), strict=True):
            if token < 0:
                row.failed = True
                continue
            row.tokens.append(token)
            if self.keep_hidden:
                row.hidden.append(state)

    def _score(self, rows: Sequence[DecodingRow], drawn: Sequence[int], logits: Tensor) -> None:
        """Score the new tokens of the rows that ask for it."""
        scored = [i for i, row in enumerate(rows) if row.top_scores is not None and drawn[i] >= 0]
        if not scored:
            return
        index = torch.tensor([scored, [drawn[i] for i in scored]], device="cpu").to(logits.device)
        logprobs = logits.index_select(0, index[0]).float().log_softmax(dim=-1)
        most = min(max(rows[i].top_scores or 0 for i in scored), logprobs.shape[1])
        chosen = logprobs.gather(1, index[1][:, None])[:, 0].tolist()
        values, tokens = (found.tolist() for found in logprobs.topk(most, dim=-1))
        for place, i in enumerate(scored):
            count = rows[i].top_scores or 0
            top = tuple(zip(tokens[place][:count], values[place][:count], strict=True))
            rows[i].scores.append(TokenScore(chosen[place], top))
