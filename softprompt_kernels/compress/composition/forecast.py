"""A dry run of a composition: its sizes, and what it would take, measured on a few queries. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.composition.settings import composition_of
from softprompt_kernels.compress.composition.work import Work, prepare
from softprompt_kernels.compress.forecast import seconds_of_step
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.models import prefix_of

MEASURED_QUERIES = 8
STUDENTS = 5
"""Students that are measured on held-out and test queries: without context, alone, not moved, joined, trained."""


@dataclass(frozen=True)
class CompositionPlan:
    """What a composition would be.

    Args:
        names: of the documents.
        context_tokens, prompt_tokens: of each document; prompt tokens as many as the joined prompt keeps.
        prompt_bytes: of the keys and values of the joined prompt, in the model's dtype.
        queries: number of each set: "train", "heldout" and "test".
        left_out: queries that do not say which document they mean.
        fits_whole: whether the full texts of all documents fit into the model's window together.
        seconds_per_step: measured.
        estimated_seconds: by stage.
    """

    names: tuple[str, ...]
    context_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    prompt_bytes: int
    queries: dict[str, int]
    left_out: int
    fits_whole: bool
    seconds_per_step: float
    estimated_seconds: dict[str, float]


@own_torch_modes()
def plan_composition(
    runs: Sequence[str | Path], output: str | Path, *, reporter: Reporter | None = None, **options: Any
) -> CompositionPlan:
    """Measure on a few queries what `compose` would do. Nothing is written.

    Args:
        runs, output, options: as in `compose`.
        reporter: receives the progress; None reports nothing.

    Raises:
        SoftPromptError: as `compose`.
    """
    reporter = reporter or SilentReporter()
    composition = composition_of([Path(run) for run in runs], Path(output), options)
    work = prepare(composition)
    inputs, config = work.inputs, composition.config
    sequences = _examples(work)
    prefix = prefix_of(inputs.model, work.prompt).detach()
    hidden_states(inputs.model, prefix, sequences, SilentReporter(), "")  # the first call compiles and allocates
    begin = time.perf_counter()
    hidden_states(inputs.model, prefix, sequences, SilentReporter(), "")
    sequence_seconds = (time.perf_counter() - begin) / len(sequences)

    batch = (sequences * config.batch_size)[: config.batch_size]
    step_seconds = seconds_of_step(inputs, work.prompt, batch, config.micro_batch_size)

    measured = len(inputs.heldout) + len(inputs.test)
    tokens_of_sequence = sum(example.length for example in sequences) / len(sequences)
    token_seconds = sequence_seconds / tokens_of_sequence
    contexts = sum(document.inputs.context_tokens for document in work.documents)
    whole = inputs.context_tokens * (2 if inputs.test else 1) if work.fits_whole else 0
    read = (len(inputs.train) if config.steps else 0) + measured
    return CompositionPlan(
        names=tuple(document.source.name for document in work.documents),
        context_tokens=tuple(document.inputs.context_tokens for document in work.documents),
        prompt_tokens=tuple(composition.kept),
        prompt_bytes=prefix.to(dtype=inputs.model.dtype).nbytes,
        queries={name: len(queries) for name, queries in inputs.sets.items()},
        left_out=work.left_out,
        fits_whole=work.fits_whole,
        seconds_per_step=step_seconds,
        estimated_seconds={
            "answers": contexts * token_seconds + read * sequence_seconds,
            "baselines": whole * token_seconds + (STUDENTS - 1 + work.fits_whole) * measured * sequence_seconds,
            "training": step_seconds * config.steps,
            "evaluation": sequence_seconds * measured,
        },
    )


def _examples(work: Work) -> list[Example]:
    """Queries of all documents, each with as many tokens of output as an answer may have."""
    inputs = work.inputs
    queries = [*inputs.heldout, *inputs.train][:MEASURED_QUERIES]
    end = inputs.tokenizer.eos_token_id or 0
    return [
        Example(tuple(inputs.chat.query_ids(query.input)), (int(end),) * inputs.config.new_tokens) for query in queries
    ]
