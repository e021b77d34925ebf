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
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.decode.batch import DecodingBatch, DecodingRow
from softprompt_kernels.models.families import text_config
from softprompt_kernels.models.finite import not_finite
from softprompt_kernels.models.forward import check_inputs, prefix_length
from softprompt_kernels.models.head import head_of
from softprompt_kernels.models.prepare import check_prepared
from softprompt_kernels.models.tap import QueryRecorder
from softprompt_kernels.prompts.prefix import Prefix

_REFILL = 8
"""New inputs join when 1 / `_REFILL` of the batch is free: few tokens at a time use the processor badly."""


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
    chosen: Collection[int] | None = None,
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
        chosen: the indices of the inputs that are continued, as all together would be; None: all.

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
    head_of(model)
    if inputs:
        longest = max(map(len, inputs))
        check_inputs(model, torch.empty(1, longest, dtype=torch.int64, device="cpu"), prefix, None, None, new_tokens)
    ids = [tuple(tokens) for tokens in inputs]
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for index in sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i])):
        seed_of_row = (seed, _digest(ids[index]), seen[ids[index]])
        if chosen is None or index in chosen:
            rows.append(DecodingRow(ids[index], seed=seed_of_row, temperature=temperature, index=index))
        seen[ids[index]] += 1
    batch = DecodingBatch(model, prefix, min(batch_size, len(rows) or 1), recorder=recorder, keep_hidden=True)
    return _Sampler(batch, new_tokens, frozenset(end_tokens)).run(rows)


def _digest(tokens: tuple[int, ...]) -> int:
    """A number of 64 bits that differs for different tokens."""
    return int.from_bytes(hashlib.blake2b(repr(tokens).encode(), digest_size=8).digest(), "big")


class _Sampler:
    """Continues rows of similar lengths behind one prefix."""

    def __init__(self, batch: DecodingBatch, new_tokens: int, ends: frozenset[int]) -> None:
        self.batch, self.new_tokens, self.ends = batch, new_tokens, ends

    def run(self, waiting: list[DecodingRow]) -> Iterator[Continuation]:
        """Continue all rows. Rows of similar lengths should be neighbours, equal inputs too."""
        batch = self.batch
        window: int | None = getattr(text_config(batch.model), "sliding_window", None)
        own = max((len(row.input) for row in waiting), default=0) + self.new_tokens
        # With a window, rows of different lengths cost more attention (see `Placement`): they start together.
        together = window is not None and prefix_length(batch.prefix) + own > window
        least = batch.size if together else -(-batch.size // _REFILL)
        start = 0
        while start < len(waiting) or batch.rows:
            if batch.free >= least:
                while start < len(waiting) and batch.free:
                    new = waiting[start : start + batch.fitting(islice(waiting, start, None))]
                    start += len(new)
                    batch.cache.reserve(max(len(row.input) for row in new) + self.new_tokens - 1)
                    batch.join(new)
                    yield from self._remove_ended()
            if batch.rows:
                batch.step()
                yield from self._remove_ended()

    def _remove_ended(self) -> list[Continuation]:
        """Take the rows that have ended out of the batch, and return what they got."""
        for row in self.batch.rows:
            if row.failed:
                raise not_finite(self.batch.model, f"logits after inputs[{row.index}] and {len(row.tokens)} new tokens")
        ended = [row for row in self.batch.rows if self._has_ended(row)]
        self.batch.leave(ended)
        return [Continuation(row.index, tuple(row.tokens), torch.stack(row.hidden)) for row in ended]

    def _has_ended(self, row: DecodingRow) -> bool:
        return len(row.tokens) == self.new_tokens or row.tokens[-1] in self.ends
