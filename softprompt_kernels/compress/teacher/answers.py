"""The teacher's answers to queries, and the last hidden states of teacher and students.

The context's keys and values are computed once and shared by all sequences of all batches. A query costs only its own
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Batch, Example, in_batches
from softprompt_kernels.models import FedTokens, QueryRecorder, QueryTap, sample
from softprompt_kernels.models.finite import check_finite
from softprompt_kernels.prompts import Prefix

TOKENS_PER_BATCH = 1024
"""Padded tokens that go through the model at once without gradients."""


class Recorder(QueryRecorder, Protocol):
    """Watches the teacher while it reads or writes answers, which are known by numbers."""

    def add(self, number: int, hidden: Tensor) -> None:
        """Receive `[n, d]`, the last hidden states that predict the output of an example."""


def answer(
    model: PreTrainedModel,
    chat: ChatFormat,
    prefix: Prefix | None,
    queries: Sequence[Query],
    *,
    new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    reporter: Reporter,
    description: str = "Teacher's answers",
    recorder: Recorder | None = None,
) -> list[Example]:
    """The queries as examples, in the same order. The teacher answers those without an output.

    Answers are sampled from the teacher's whole distribution, without top-k and top-p, because the training targets are
    the whole distribution too. They depend on `seed`, and on `batch_size` only by rounding (see `models.sample`). The
    caller's random state is not changed. Of many ranks each samples a share, and all get all answers.

    Args:
        model, chat: the model and its chat format.
        prefix: what the model reads before each query: the teacher's prefix, or that of a prompt; None: nothing.
        queries: any number.
        new_tokens: at most so many tokens an answer.
        temperature: divides the logits; 0 is greedy.
        batch_size: the largest number of answers sampled at a time.
        seed: of sampling.
        reporter, description: receives the progress under this description.
        recorder: watches the queries that this rank answers, by their index; None: nobody does.
    """
    inputs = [(*q.lead, *chat.query_ids(q.input, answered=q.output is not None)) for q in queries]
    outputs = [None if query.output is None else tuple(chat.output_ids(query.output)) for query in queries]
    unanswered = [index for index, output in enumerate(outputs) if output is None]
    # Equal queries share the tokens of their input, so they stay together.
    costs = [len(inputs[index]) + new_tokens for index in unanswered]
    own = frozenset(ranks.share(costs, [inputs[index] for index in unanswered]))
    continuations = sample(
        model,
        [inputs[index] for index in unanswered],
        prefix,
        new_tokens=new_tokens,
        temperature=temperature,
        end_tokens=end_tokens(model, chat),
        batch_size=batch_size,
        seed=seed,
        recorder=None if recorder is None else _Renumbered(recorder, unanswered),
        chosen=own,
    )
    sampled_here: dict[int, tuple[int, ...]] = {}
    with reporter.progress(description, len(own), "query") as advance:
        for sampled in continuations:
            number = unanswered[sampled.index]
            sampled_here[number] = sampled.tokens
            if recorder is not None:
                recorder.add(number, sampled.hidden)
            advance(1)
    for of_rank in ranks.gather(list(sampled_here.items())):
        for number, tokens in of_rank:
            outputs[number] = tuple(tokens)
    return [Example(x, y) for x, y in zip(inputs, outputs, strict=True) if y is not None]


def end_tokens(model: PreTrainedModel, chat: ChatFormat) -> frozenset[int]:
    """The tokens that end an answer: those of the model's generation config, of the chat format and the tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return chat.end_tokens | frozenset([ends] if isinstance(ends, int) else ends or [])


def hidden_states(
    model: PreTrainedModel, prefix: Prefix | None, examples: Sequence[Example], reporter: Reporter, description: str
) -> list[Tensor]:
    """The last hidden states that predict the output of each example, `[n_i, d]` in the model's dtype.

    Args:
        model: prepared.
        prefix: the prefix of teacher or student; None for none.
        examples: any number. They are batched by length.
        reporter, description: receives the progress under this description.
    """
    found = dict(_read(model, prefix, examples, reporter, description, None))
    return [found[index] for index in range(len(examples))]


def watch(
    model: PreTrainedModel,
    prefix: Prefix,
    examples: Sequence[Example],
    numbers: Sequence[int],
    recorder: Recorder,
    reporter: Reporter,
    description: str,
) -> None:
    """Let the recorder watch the teacher read answers that it has not watched it write.

    Args:
        model, prefix, examples, reporter, description: as in `hidden_states`.
        numbers: of the examples.
        recorder: receives their hidden states, and chooses queries.
    """
    for index, hidden in _read(model, prefix, examples, reporter, description, _Renumbered(recorder, numbers)):
        recorder.add(numbers[index], hidden)


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    prefix: Prefix | None,
    examples: Sequence[Example],
    reporter: Reporter,
    description: str,
    recorder: QueryRecorder | None,
) -> Iterator[tuple[int, Tensor]]:
    """Pairs of an example's index and its hidden states."""
    with reporter.progress(description, len(examples), "sequence") as advance:
        for group in in_batches(examples, TOKENS_PER_BATCH):
            chosen = [examples[index] for index in group]
            tap = None if recorder is None else recorder.tap(_fed(group, chosen))
            rows = Batch.of(chosen, model.device).hidden(model, prefix, tap)
            check_finite(model, "hidden states", rows)
            yield from zip(group, rows.split([example.targets for example in chosen]), strict=True)
            advance(len(group))


def _fed(group: Sequence[int], examples: Sequence[Example]) -> list[FedTokens]:
    """The tokens of a right-padded batch of examples with these numbers."""
    width = max(example.length for example in examples)
    fed = []
    for row, (number, example) in enumerate(zip(group, examples, strict=True)):
        inputs, place = len(example.input_ids), row * width
        fed.append(FedTokens((number,), example.input_ids, 0, place))
        fed.append(FedTokens((number,), example.output_ids[:-1], inputs, place + inputs))
    return fed


@dataclass(frozen=True, eq=False)
class _Renumbered:
    """A recorder for sequence i that knows it as `numbers[i]`."""

    recorder: QueryRecorder
    numbers: Sequence[int]

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap | None:
        """As the recorder's."""
        return self.recorder.tap(
            [replace(part, sequences=tuple(self.numbers[i] for i in part.sequences)) for part in fed]
        )
