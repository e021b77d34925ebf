"""A dry run: what a compression would cost and whether the context matters, measured on a few queries in memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import Prompt, Schedule, Trainer
from softprompt_kernels.compress.evaluate.distance import measure
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.initial_prompt import initial_prompt
from softprompt_kernels.compress.inputs import Loaded, RunInputs, load_inputs
from softprompt_kernels.compress.long_context.storage import ContextPlan, plan_context
from softprompt_kernels.compress.matching.forecast import matching_seconds
from softprompt_kernels.compress.matching.match import Matching
from softprompt_kernels.compress.parallel.launch import launched
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, hidden_states
from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
from softprompt_kernels.models import prefix_of
from softprompt_kernels.ops import teacher_moments
from softprompt_kernels.prompts import Prefix

MEASURED_QUERIES = 8
MEASURED_TOKENS = 8  # decoding steps that are timed
EVALUATION_PASSES, TEST_PASSES = 5, 2
"""Students that a run evaluates: about five on the training sample and the held-out set; on the test set those without
baselines of chosen tokens and the initial prompt."""


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Args:
        context_tokens, prompt_tokens: C and k.
        ratio: C / k.
        prompt_bytes, context_kv_bytes: bytes of the keys and values of both, in the model's dtype.
        checkpoint_bytes: of all checkpoints on disk: the prompt and two moments of the optimiser in each.
        train_queries, heldout_queries, test_queries: number of each.
        kl_none: KL of the model without the context from the model with it, nats per token, on a few held-out
            queries. It is what a prompt can recover at most.
        seconds_per_step: measured.
        estimated_seconds: by stage, extrapolated from what was measured. Of many processes that each have processors of
            their own.
        context_storage: where the keys and values of the context are, in words.
        context_memory_bytes, context_disk_bytes: of these keys and values; one of them is 0.
        peak_bytes: by stage, what it takes beside the model and these keys and values, counted.
        processes: that torchrun started.
        exchanged_bytes: what they sum over all of them in each step: the gradient of the prompt.
        segments: that the context is read in. Keys and values are those of one of them then, with the prompt before it.
        disk_bytes: most that a run in segments has on disk; None for another run.
    """

    context_tokens: int
    prompt_tokens: int
    ratio: float
    prompt_bytes: int
    checkpoint_bytes: int
    context_kv_bytes: int
    train_queries: int
    heldout_queries: int
    test_queries: int
    kl_none: float
    seconds_per_step: float
    estimated_seconds: dict[str, float]
    context_storage: str = ""
    context_memory_bytes: int = 0
    context_disk_bytes: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    processes: int = 1
    exchanged_bytes: int = 0
    segments: int = 1
    disk_bytes: int | None = None


@own_torch_modes()
def plan_one(config: CompressConfig, reporter: Reporter | None = None, loaded: Loaded | None = None) -> Plan:
    """What `compress_one` would do with a context. Results and errors as `plan` in start.py.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.
        loaded: as in `load_inputs`.
    """
    reporter = reporter or SilentReporter()
    inputs = load_inputs(config, loaded)
    if remark := inputs.remark:
        reporter.message(remark)
    return plan_inputs(inputs, reporter)


def plan_inputs(inputs: RunInputs, reporter: Reporter) -> Plan:
    """What a run with these inputs would be, measured on a few of its queries.

    Args:
        inputs: of the run.
        reporter: receives the progress.
    """
    output = inputs.config.output
    with _scratch_file(output) as file:
        stored = plan_context(inputs, RunFolder(output), file, reporter)
        return _measured(inputs, stored, reporter)


@contextmanager
def _scratch_file(output: Path) -> Iterator[Path]:
    """A path for the context on the disk of the run. What is written there is deleted at the end."""
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(dir=folder, prefix=".softprompt-") as scratch:
        yield Path(scratch) / "context.safetensors"


def _measured(inputs: RunInputs, stored: ContextPlan, reporter: Reporter) -> Plan:
    """The plan, measured on a few queries."""
    config = inputs.config
    begin = time.perf_counter()
    context = capture_context(inputs.model, inputs.context_ids, storage=stored.storage)
    capture_seconds = time.perf_counter() - begin

    def sample(queries: int, tokens: int) -> tuple[list[Example], float]:
        """Answers of at most `tokens` tokens to the first `queries` queries, and the seconds that they took."""
        pool = [replace(query, output=None) for query in (*inputs.heldout, *inputs.train)]
        start = time.perf_counter()
        examples = answer(
            inputs.model,
            inputs.chat,
            context,
            pool[:queries],
            new_tokens=tokens,
            temperature=config.sample_temperature,
            batch_size=config.sample_batch,
            seed=config.seed,
            reporter=reporter,
        )
        return examples, time.perf_counter() - start

    # Answers: one batch with 1 token gives the prefill, one with more tokens the cost of a decoding step.
    # The estimate is for answers of full length. Answers that end early leave the batch and make a run faster.
    total = len(inputs.train) + len(inputs.heldout)
    batch_queries = min(config.sample_batch, total)
    _, prefill_seconds = sample(batch_queries, 1)
    _, decode_seconds = sample(batch_queries, 1 + MEASURED_TOKENS)
    examples, _ = sample(min(MEASURED_QUERIES, total), min(config.new_tokens, 2 * MEASURED_TOKENS))
    token_seconds = max(0.0, decode_seconds - prefill_seconds) / MEASURED_TOKENS
    asked = [query.output is None and config.server is None for of_set in inputs.sets.values() for query in of_set]
    unanswered = sum(asked)  # by the model here
    one_answer = (prefill_seconds + token_seconds * config.new_tokens) / batch_queries
    compared = len(inputs.heldout) + len(inputs.test)

    # Evaluation: teacher and student on the examples just sampled.
    begin = time.perf_counter()
    students = {"none": no_context_prefix(inputs.model, inputs.chat)}
    distances = measure(inputs.model, context, students, examples, reporter, "a few")
    sequence_seconds = (time.perf_counter() - begin) / (2 * len(examples))
    # The run's sequences may be longer than these.
    mean_length = sum(example.length for example in examples) / len(examples)
    mean_tokens = mean_length + max(0, config.new_tokens - 2 * MEASURED_TOKENS)
    sequence_seconds *= mean_tokens / mean_length

    # Targets: the moments of the tokens just sampled. An entropy alone costs about as much.
    moments_seconds = 0.0
    if config.steps and inputs.objective.form not in (None, "hidden"):
        moments_seconds = _moments_seconds(inputs, context, examples) * config.new_tokens * len(inputs.train)

    # A round: the student answers all training queries, and the teacher reads them.
    one_round = len(inputs.train) * (one_answer + sequence_seconds) + moments_seconds

    # Matching: one layer of each kind, with the rows of the examples just sampled. The run has more rows.
    rows = min(config.matching_rows, round(mean_tokens * len(inputs.train)))
    # The teacher is recorded while it writes its answers. Given ones, and those of a server, it has to read.
    given = sum(query.output is not None or config.server is not None for query in inputs.train)
    recorded = config.init == "matched" or bool(config.steps and inputs.objective.form)
    matching = 0.0
    if config.init == "matched":
        settings = Matching(config.tokens, config.matching_steps, config.frozen)
        matching = matching_seconds(inputs.model, context, examples, settings, rows)

    # Training: the second of two steps on sequences of full length. Its time does not depend on where it starts.
    start = "first" if config.init == "matched" else config.init
    prompt = initial_prompt(replace(inputs, config=config.model_copy(update={"init": start})), context)
    padded = [Example(e.input_ids, (e.output_ids * config.new_tokens)[: config.new_tokens]) for e in examples]
    batch = (padded * config.batch_size)[: config.batch_size]
    step_seconds = seconds_of_step(inputs, prompt, batch, config.micro_batch_size)

    trained_bytes = sum(parameter.nbytes for parameter in prompt.parameters())
    checkpoint_bytes = (3 * config.keep_checkpoints + config.save_best) * trained_bytes if config.steps else 0
    with torch.no_grad():
        prompt_bytes = prefix_of(inputs.model, prompt).to(dtype=inputs.model.dtype).nbytes
    evaluated = min(config.evaluation_sequences, len(inputs.train)) + len(inputs.heldout)
    heldout_passes = len(inputs.heldout) * (config.steps // config.evaluate_every if config.evaluate_every else 0)
    passes = EVALUATION_PASSES * evaluated + TEST_PASSES * len(inputs.test)
    world, layers, batch_size = launched().world, context.num_layers, len(batch)
    trained = sum(parameter.numel() for parameter in prompt.parameters())
    return Plan(
        context_tokens=inputs.context_tokens,
        prompt_tokens=config.tokens,
        ratio=inputs.context_tokens / config.tokens,
        prompt_bytes=prompt_bytes,
        checkpoint_bytes=checkpoint_bytes,
        context_kv_bytes=context.nbytes,
        train_queries=len(inputs.train),
        heldout_queries=len(inputs.heldout),
        test_queries=len(inputs.test),
        kl_none=distances["none"].kl,
        seconds_per_step=step_seconds,
        estimated_seconds={
            "context": capture_seconds,
            "answers": (unanswered * one_answer + sequence_seconds * given * recorded + moments_seconds) / world,
            # Layers and sequences are not divided.
            **({"matching": matching * -(-layers // world) / layers} if config.init == "matched" else {}),
            "training": step_seconds * config.steps * -(-batch_size // world) / batch_size,
            **({"heldout_evaluations": sequence_seconds * heldout_passes / world} if config.evaluate_every else {}),
            **({"rounds": config.rounds * one_round / world} if config.rounds else {}),
            "evaluation": sequence_seconds * passes / world,
            "answers_compared": compared * one_answer / world,
        },
        context_storage=stored.summary,
        context_memory_bytes=stored.memory_bytes,
        context_disk_bytes=stored.disk_bytes,
        peak_bytes=stored.peak_bytes,
        processes=world,
        exchanged_bytes=4 * trained if world > 1 else 0,
    )


def seconds_of_step(inputs: RunInputs, prompt: Prompt, batch: Sequence[Example], micro_batch_size: int | None) -> float:
    """Seconds of the second of two training steps on a batch. The prompt is not changed."""
    # NLL costs the same as KL from moments and needs no moments. It takes no softcap.
    objective = Objective("nll", replace(inputs.objective.head, softcap=None))
    size = len(batch)
    trainer = Trainer(
        inputs.model,
        prompt,
        batch,
        None,
        objective,
        Schedule(1, 0.0),
        batch_size=size,
        micro_batch_size=micro_batch_size,
    )
    trainer.accumulate(range(size))
    begin = time.perf_counter()
    trainer.accumulate(range(size))
    return time.perf_counter() - begin


def _moments_seconds(inputs: RunInputs, context: Prefix, examples: list[Example]) -> float:
    """Seconds that the moments of a token take."""
    hidden = torch.cat(hidden_states(inputs.model, context, examples, SilentReporter(), ""))
    head = inputs.objective.head
    begin = time.perf_counter()
    teacher_moments(hidden, head.weight, bias=head.bias, logit_scale=head.logit_scale, group=head.group)
    return (time.perf_counter() - begin) / hidden.shape[0]
