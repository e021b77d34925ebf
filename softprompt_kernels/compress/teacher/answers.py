"""The teacher's answers to queries, and the last hidden states of teacher and students.

The context's keys and values are computed once and shared by all sequences of all batches. A query costs only its own
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Batch, Example, in_batches
from softprompt_kernels.models import sample
from softprompt_kernels.models.attention import QueryTap
from softprompt_kernels.prompts import Prefix

TOKENS_PER_BATCH = 1024
"""Padded tokens that go through the model at once without gradients."""


def answer(
    model: PreTrainedModel,
    chat: ChatFormat,
    prefix: Prefix,
    queries: Sequence[Query],
    *,
    new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    reporter: Reporter,
    description: str = "Teacher's answers",
) -> list[Example]:
    """The queries as examples, in the same order. The teacher answers those without an output.

    Answers are sampled from the teacher's whole distribution, without top-k and top-p, because the training targets are
    the whole distribution too. They depend on `seed`, and on `batch_size` only by rounding (see `models.sample`). The
    caller's random state is not changed.

    Args:
        model, chat: the model and its chat format.
        prefix: what the model reads before each query: the teacher's prefix, or that of a prompt.
        queries: any number.
        new_tokens: at most so many tokens an answer.
        temperature: divides the logits; 0 is greedy.
        batch_size: the largest number of answers sampled at a time.
        seed: of sampling.
        reporter, description: receives the progress under this description.
    """
    inputs = [tuple(chat.query_ids(query.input)) for query in queries]
    outputs = [None if query.output is None else tuple(chat.output_ids(query.output)) for query in queries]
    unanswered = [index for index, output in enumerate(outputs) if output is None]
    sampled = sample(
        model,
        [inputs[index] for index in unanswered],
        prefix,
        new_tokens=new_tokens,
        temperature=temperature,
        end_tokens=end_tokens(model),
        batch_size=batch_size,
        seed=seed,
    )
    with reporter.progress(description, len(unanswered), "query") as advance:
        for position, output in sampled:
            outputs[unanswered[position]] = output
            advance(1)
    return [Example(x, y) for x, y in zip(inputs, outputs, strict=True) if y is not None]


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an answer: `eos_token_id` of the model's generation config."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([ends] if isinstance(ends, int) else ends or [])


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel,
    prefix: Prefix | None,
    examples: Sequence[Example],
    reporter: Reporter,
    description: str,
    *,
    tap: Callable[[Sequence[int]], QueryTap] | None = None,
) -> list[Tensor]:
    """The last hidden states that predict the output of each example, `[n_i, d]` in the model's dtype.

    Args:
        model: prepared.
        prefix: the prefix of teacher or student; None for none.
        examples: any number. They are batched by length.
        reporter, description: receives the progress under this description.
        tap: gives the tap for each batch of examples, by their indices; None records nothing.
    """
    found: dict[int, Tensor] = {}
    with reporter.progress(description, len(examples), "sequence") as advance:
        for group in in_batches(examples, TOKENS_PER_BATCH):
            chosen = [examples[index] for index in group]
            rows = Batch.of(chosen, model.device).hidden(model, prefix, None if tap is None else tap(group))
            parts = rows.split([example.targets for example in chosen])
            found.update(zip(group, parts, strict=True))
            advance(len(group))
    return [found[index] for index in range(len(examples))]
