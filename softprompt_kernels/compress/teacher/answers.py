"""The teacher at work: its answers to queries, and its last hidden states over sequences.

The context's keys and values are computed once and shared by every sequence of every batch, so a query costs its own
tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Batch, Example, in_batches
from softprompt_kernels.models import generate
from softprompt_kernels.prompts import Prefix

TOKENS_PER_BATCH = 1024
"""Padded tokens that go through the model at once where no gradient is wanted."""


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
) -> list[Example]:
    """Every query as an example; those without an output get one sampled from the teacher.

    Sampling takes the whole distribution divided by `temperature` (0: greedy), no top-k and no top-p: what is trained
    on is what the teacher says. Random numbers depend on `seed` and `batch_size`, and the caller's generator is left
    alone.
    """
    inputs = [tuple(chat.query_ids(query.input)) for query in queries]
    outputs = [None if query.output is None else tuple(chat.output_ids(query.output)) for query in queries]
    # Queries of like length together: little padding, and batches of full width for the decoding steps.
    unknown = sorted((i for i, output in enumerate(outputs) if output is None), key=lambda i: len(inputs[i]))
    with reporter.progress("Asking the teacher", len(unknown), "query") as advance, _own_randomness(model.device):
        torch.manual_seed(seed)
        for start in range(0, len(unknown), batch_size):
            chosen = unknown[start : start + batch_size]
            sampled = _sample(model, prefix, [inputs[i] for i in chosen], new_tokens, temperature)
            for index, output in zip(chosen, sampled, strict=True):
                outputs[index] = output
            advance(len(chosen))
    return [Example(x, y) for x, y in zip(inputs, outputs, strict=True) if y]


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Gives the generators of the CPU and of a GPU back as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _sample(
    model: PreTrainedModel, prefix: Prefix, inputs: Sequence[tuple[int, ...]], new_tokens: int, temperature: float
) -> list[tuple[int, ...]]:
    """Continue each input until the end of the answer or `new_tokens`; the end token is part of the output."""
    width = max(map(len, inputs))
    ids = torch.zeros(len(inputs), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(inputs):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    ends = end_tokens(model)
    how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
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
        **how,
    )
    return [_until_end(row, ends) for row in continued[:, width:].tolist()]


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an answer, as the model's generation configuration says."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tuple(tokens[: last + 1])


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, prefix: Prefix | None, examples: Sequence[Example], reporter: Reporter, description: str
) -> list[Tensor]:
    """The rows that predict the output of each example, `[n_i, d]` in the model's dtype."""
    found: dict[int, Tensor] = {}
    with reporter.progress(description, len(examples), "sequence") as advance:
        for group in in_batches(examples, TOKENS_PER_BATCH):
            chosen = [examples[index] for index in group]
            rows = Batch.of(chosen, model.device).hidden(model, prefix)
            parts = rows.split([example.targets for example in chosen])
            found.update(zip(group, parts, strict=True))
            advance(len(group))
    return [found[index] for index in range(len(examples))]
