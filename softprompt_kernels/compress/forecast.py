"""A dry run: what a compression would cost and whether it is worth it, measured on a handful of queries in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import Schedule, Trainer
from softprompt_kernels.compress.evaluate.distance import measure
from softprompt_kernels.compress.initial_prompt import initial_prompt, nothing
from softprompt_kernels.compress.inputs import set_up
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.run import CAPTURE_TOKENS
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer
from softprompt_kernels.models import capture, prefix_of

TRIED_QUERIES = 8
TRIED_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Args:
        context_tokens, prompt_tokens: C and k.
        ratio: C / k.
        prompt_bytes, context_kv_bytes: keys and values of both, in the model's dtype.
        train_queries, heldout_queries: how many of each.
        kl_none: nats per token between the model with and without the context, on a few held-out queries. It is what
            there is to recover.
        seconds_per_step: measured.
        estimated_seconds: by stage, from rates measured here; an estimate.
    """

    context_tokens: int
    prompt_tokens: int
    ratio: float
    prompt_bytes: int
    context_kv_bytes: int
    train_queries: int
    heldout_queries: int
    kl_none: float
    seconds_per_step: float
    estimated_seconds: dict[str, float]


def plan(config: CompressConfig, reporter: Reporter | None = None) -> Plan:
    """Measure on a few queries what `compress` would do with all. Nothing is written.

    Raises:
        SoftPromptError: as `compress`.
    """
    reporter = reporter or SilentReporter()
    setup = set_up(config)
    begin = time.perf_counter()
    context = capture(setup.model, setup.context_ids, CAPTURE_TOKENS)
    capture_seconds = time.perf_counter() - begin

    def ask(queries: int, tokens: int) -> tuple[list[Example], float]:
        pool = [replace(query, output=None) for query in (*setup.heldout, *setup.train)]
        start = time.perf_counter()
        examples = answer(
            setup.model,
            setup.chat,
            context,
            pool[:queries],
            new_tokens=tokens,
            temperature=config.sample_temperature,
            batch_size=config.sample_batch,
            seed=config.seed,
            reporter=reporter,
        )
        return examples, time.perf_counter() - start

    total = len(setup.train) + len(setup.heldout)
    width = min(config.sample_batch, total)
    _, first = ask(width, 1)
    _, second = ask(width, 1 + TRIED_TOKENS)
    examples, _ = ask(min(TRIED_QUERIES, total), min(config.new_tokens, 2 * TRIED_TOKENS))
    decode = max(0.0, second - first) / TRIED_TOKENS
    unknown = sum(query.output is None for query in (*setup.train, *setup.heldout))
    sampling = unknown / width * (first + decode * config.new_tokens)

    begin = time.perf_counter()
    distances = measure(setup.model, context, {"none": nothing(setup.model, setup.chat)}, examples, reporter, "a few")
    per_sequence = (time.perf_counter() - begin) / (2 * len(examples))
    # Sequences of full length: the tried ones are shorter.
    tried = sum(example.length for example in examples) / len(examples)
    longer = (tried + max(0, config.new_tokens - 2 * TRIED_TOKENS)) / tried

    prompt = initial_prompt(setup, context)
    padded = [Example(e.input_ids, (e.output_ids * config.new_tokens)[: config.new_tokens]) for e in examples]
    batch = (padded * config.batch_size)[: config.batch_size]
    trainer = Trainer(
        setup.model,
        prompt,
        batch,
        None,
        # Labels only: it costs what the moments cost, and needs none.
        Objective("nll", replace(setup.objective.head, softcap=None)),
        Schedule(1, 0.0),
        batch_size=len(batch),
        micro_batch_size=config.micro_batch_size,
    )
    trainer.accumulate(range(len(batch)))
    begin = time.perf_counter()
    trainer.accumulate(range(len(batch)))
    step = time.perf_counter() - begin

    with torch.no_grad():
        prompt_bytes = prefix_of(setup.model, prompt).to(dtype=context.dtype).nbytes
    evaluated = min(config.evaluation_sequences, len(setup.train)) + len(setup.heldout)
    return Plan(
        context_tokens=setup.context_tokens,
        prompt_tokens=config.tokens,
        ratio=setup.context_tokens / config.tokens,
        prompt_bytes=prompt_bytes,
        context_kv_bytes=context.nbytes,
        train_queries=len(setup.train),
        heldout_queries=len(setup.heldout),
        kl_none=distances["none"].kl,
        seconds_per_step=step,
        estimated_seconds={
            "context": capture_seconds,
            "asking the teacher": sampling,
            "teacher's distributions": per_sequence * longer * len(setup.train),
            "training": step * config.steps,
            "evaluation": per_sequence * longer * evaluated * 6,
        },
    )
