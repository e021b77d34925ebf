"""The teacher's answers to queries, and the last hidden states of teacher and students.

The context's keys and values are computed once and shared by all sequences of all batches. A query costs only its own
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Batch, Example, in_batches
from softprompt_kernels.models import generate
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
    the whole distribution too. The samples depend on `seed` and `batch_size`. The caller's random state is not changed.

    Args:
        model, chat: the model and its chat format.
        prefix: what the model reads before each query: the teacher's prefix, or that of a prompt.
        queries: any number.
        new_tokens: at most so many tokens an answer.
        temperature: divides the logits; 0 is greedy.
        batch_size: answers sampled at once.
        seed: of sampling.
        reporter, description: receives the progress under this description.
    """
    inputs = [tuple(chat.query_ids(query.input)) for query in queries]
    outputs = [None if query.output is None else tuple(chat.output_ids(query.output)) for query in queries]
    # Sorted by length, so that the queries of a batch need little padding.
    unanswered = sorted((i for i, output in enumerate(outputs) if output is None), key=lambda i: len(inputs[i]))
    with reporter.progress(description, len(unanswered), "query") as advance, _forked_rng(model.device):
        torch.manual_seed(seed)
        for start in range(0, len(unanswered), batch_size):
            chosen = unanswered[start : start + batch_size]
            sampled = _sample(model, prefix, [inputs[i] for i in chosen], new_tokens, temperature)
            for index, output in zip(chosen, sampled, strict=True):
                outputs[index] = output
            advance(len(chosen))
    return [Example(x, y) for x, y in zip(inputs, outputs, strict=True) if y]


def _forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random state of the CPU, and of `device` if it is a GPU, at the end of the context."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _sample(
    model: PreTrainedModel, prefix: Prefix, inputs: Sequence[tuple[int, ...]], new_tokens: int, temperature: float
) -> list[tuple[int, ...]]:
    """The answer to each input: at most `new_tokens` tokens, with the end token if the model wrote one."""
    width = max(map(len, inputs))
    ids = torch.zeros(len(inputs), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(inputs):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    ends = end_tokens(model)
    sampling = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    continued = generate(
        model,
        ids.to(model.device),
        prefix,
        attention_mask=mask.to(model.device),
        max_new_tokens=new_tokens,
        pad_token_id=min(ends, default=0),
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        **sampling,
    )
    return [_until_end(row, ends) for row in continued[:, width:].tolist()]


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an answer: `eos_token_id` of the model's generation config."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tuple(tokens[: last + 1])


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
