"""A forecast of the training of a compressor: sizes, and times measured on one context and on one step."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from softprompt_kernels.compress.compressor.judge import Judge
from softprompt_kernels.compress.compressor_runs.config import CompressorConfig
from softprompt_kernels.compress.compressor_runs.inputs import load_compressor_inputs
from softprompt_kernels.compress.compressor_runs.run import new_compressor, new_teacher, new_trainer
from softprompt_kernels.compress.inputs import Loaded
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Reporter, SilentReporter

_MEASURED = 2  # contexts of each kind


@dataclass(frozen=True)
class CompressorPlan:
    """What a training would be.

    Args:
        contexts: how many there are to train on, held out, and to report.
        skipped: how many cannot be used.
        context_tokens: tokens of the shortest and of the longest context.
        segment_tokens: the longest segment.
        prompt_tokens: of the prompts of the shortest and the longest context.
        parameters: how many numbers are trained.
        kl_none: KL of the model without the context from the model with it, nats per token, on a few contexts.
        seconds_per_step: measured.
        estimated_seconds: by stage, extrapolated from what was measured.
    """

    contexts: dict[str, int]
    skipped: int
    context_tokens: tuple[int, int]
    segment_tokens: int
    prompt_tokens: tuple[int, int]
    parameters: int
    kl_none: float
    seconds_per_step: float
    estimated_seconds: dict[str, float]


@own_torch_modes()
def plan_compressor(
    config: CompressorConfig, reporter: Reporter | None = None, loaded: Loaded | None = None
) -> CompressorPlan:
    """Measure on a few contexts what `train_compressor` would do with all of them. Nothing is written to `output`.

    Arguments and errors as in `train_compressor`.
    """
    reporter = reporter or SilentReporter()
    inputs = load_compressor_inputs(config, reporter, loaded)
    sets, form = inputs.sets, inputs.form
    with tempfile.TemporaryDirectory() as temporary:
        teacher = new_teacher(inputs, Path(temporary), "")
        begin = time.perf_counter()
        train = teacher.lessons(
            sets["train"][:_MEASURED], evaluated=False, reporter=reporter, description="A few training contexts"
        )
        lesson_seconds = (time.perf_counter() - begin) / len(train)
        few = teacher.lessons(
            sets["heldout"][:_MEASURED], evaluated=True, reporter=reporter, description="A few held-out contexts"
        )
        compressor = new_compressor(inputs)
        try:
            judge = Judge.of(compressor, inputs.chat, few, reporter, "Baselines, a few contexts")
            kl_none = judge.kl_none
            begin = time.perf_counter()
            judge.kl(compressor)
            judge_seconds = (time.perf_counter() - begin) / len(few)
            repeated = (train * config.batch_contexts)[: config.batch_contexts]
            trainer = new_trainer(inputs, compressor, repeated)
            trainer.accumulate()
            begin = time.perf_counter()
            trainer.accumulate()
            step_seconds = time.perf_counter() - begin
            parameters = sum(parameter.numel() for parameter in compressor.named_parameters().values())
        finally:
            if compressor.lora is not None:
                compressor.lora.detach()
    counts = {name: len(of_set) for name, of_set in sets.items()}
    tokens = [one.ids.shape[0] for of_set in sets.values() for one in of_set]
    judged = counts["heldout"] * -(-config.steps // config.evaluate_every)
    return CompressorPlan(
        contexts=counts,
        skipped=len(inputs.skipped),
        context_tokens=(min(tokens), max(tokens)),
        segment_tokens=form.segment_tokens,
        prompt_tokens=(form.prompt_tokens(min(tokens)), form.prompt_tokens(max(tokens))),
        parameters=parameters,
        kl_none=kl_none,
        seconds_per_step=step_seconds,
        estimated_seconds={
            "answers": lesson_seconds * sum(counts.values()),
            "training": step_seconds * config.steps + judge_seconds * judged,
            "evaluation": judge_seconds * (counts["heldout"] + counts["test"]),
        },
    )
