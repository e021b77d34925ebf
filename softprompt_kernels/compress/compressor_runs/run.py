"""The training of a compressor, from contexts to its saved folder.

    inputs → folder → lessons → baselines → training → evaluation → saving

Each stage stores its result in the run's folder. After an interruption the same call resumes with what is stored. What
is saved is the state of the step that was best on held-out contexts. Other contexts, the test set, report it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from softprompt_kernels.compress.compressor.compressor import Compressor
from softprompt_kernels.compress.compressor.judge import Judge
from softprompt_kernels.compress.compressor.lessons import Lesson, Teacher
from softprompt_kernels.compress.compressor.lora import Lora
from softprompt_kernels.compress.compressor.store import check_destination, fingerprints, save_compressor
from softprompt_kernels.compress.compressor.trainer import CompressorTrainer, Draws
from softprompt_kernels.compress.compressor_runs.config import CompressorConfig
from softprompt_kernels.compress.compressor_runs.inputs import SETS, CompressorInputs, load_compressor_inputs
from softprompt_kernels.compress.distill.checkpoint import Checkpoints
from softprompt_kernels.compress.distill.trainer import Schedule, StepReport
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import CHAT_FILE, Loaded, sha256
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.lock import check_unlocked, locked
from softprompt_kernels.compress.process.signals import signal_of, signals_as_interrupts
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.report.versions import made_with
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.stage_times import StageTimes
from softprompt_kernels.prompts import initialise
from softprompt_kernels.prompts.adapter import base_name

FOLDER = "compressor"
"""In the folder of a run: the saved compressor."""


@own_torch_modes()
def train_compressor(
    config: CompressorConfig, reporter: Reporter | None = None, loaded: Loaded | None = None
) -> dict[str, Any]:
    """Train a compressor on many contexts.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.
        loaded: the model and the tokenizer that the configuration names, from `load_model`; None: they are loaded.

    Returns:
        The content of evaluation.json: figures of held-out and test contexts, together and by context, KL in nats per
        token; the step that was chosen; seconds; the contexts that were skipped.

    Raises:
        SoftPromptError: bad input. Most is found before anything is written; otherwise the last good state is kept.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP during training. The state is saved first.
        KeyboardInterrupt: the same in another stage.
    """
    ranks.check_alone("a compressor")
    reporter, times = reporter or SilentReporter(), StageTimes()
    with signals_as_interrupts():
        check_unlocked(config.output)
        with times("load"):
            inputs = load_compressor_inputs(config, reporter, loaded)
        with locked(config.output):
            folder = RunFolder(config.output)
            folder.claim(inputs.identity(folder.identity), config.to_yaml(), made_with())
            finished = folder.read_evaluation()
            if finished is not None:
                reporter.message(f"The run in {folder.path} is already finished.")
                return finished
            return _Run(inputs, folder, reporter, times).figures()


def new_compressor(inputs: CompressorInputs) -> Compressor:
    """The compressor before training: embeddings of random tokens, and LoRA that changes nothing yet.

    Args:
        inputs: the inputs of the training. The model gets LoRA layers, if the form has any.
    """
    model, form, seed = inputs.model, inputs.form, inputs.config.seed
    generator = torch.Generator().manual_seed(seed)
    ids = initialise.vocabulary_tokens(
        len(inputs.tokenizer), form.tokens, exclude=inputs.tokenizer.all_special_ids, generator=generator
    )
    embed = cast(Callable[[torch.Tensor], torch.Tensor], model.get_input_embeddings())
    summary = initialise.embed_tokens(embed, ids.to(model.device))
    return Compressor(model, form, summary, Lora(model, form.lora_rank, seed) if form.lora_rank else None)


def new_trainer(inputs: CompressorInputs, compressor: Compressor, lessons: list[Lesson]) -> CompressorTrainer:
    """The trainer of a compressor, at its first step."""
    config = inputs.config
    return CompressorTrainer(
        compressor,
        lessons,
        inputs.objective,
        Schedule(config.steps, config.learning_rate, config.warmup_steps),
        Draws(
            config.batch_contexts,
            config.batch_queries,
            config.segments,
            config.backprop_segments,
            config.micro_batch_size,
            config.seed,
        ),
        lora_learning_rate=config.lora_learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def new_teacher(inputs: CompressorInputs, folder: Path, key: str) -> Teacher:
    """The teacher of all contexts, which keeps its lessons in a folder."""
    config = inputs.config
    return Teacher(
        inputs.model,
        inputs.chat,
        inputs.objective,
        folder,
        key,
        config.new_tokens,
        config.sample_temperature,
        config.sample_batch,
        config.seed,
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """The stages after the inputs are loaded, and what they share."""

    inputs: CompressorInputs
    folder: RunFolder
    reporter: Reporter
    times: StageTimes

    def figures(self) -> dict[str, Any]:
        """The content of evaluation.json, after all stages."""
        inputs, folder, times = self.inputs, self.folder, self.times
        write_text(folder.path / CHAT_FILE, inputs.chat.rendered_from)
        times.keep_in(folder.stages)
        check_destination(folder.path / FOLDER)
        key = sha256(json.dumps(folder.identity, sort_keys=True))
        with times("answers"):
            folder.cache.mkdir(exist_ok=True)
            teacher = new_teacher(inputs, folder.cache, key)
            titles = dict(zip(SETS, ("training", "held-out", "test"), strict=True))
            lessons = {
                name: teacher.lessons(
                    inputs.sets[name],
                    evaluated=name != "train",
                    reporter=self.reporter,
                    description=f"Teacher's answers, {titles[name]} contexts",
                )
                for name in SETS
            }
        marks = fingerprints(inputs.model, inputs.tokenizer)  # before LoRA
        compressor = new_compressor(inputs)
        try:
            with times("baselines"):
                judges = {
                    name: Judge.of(
                        compressor, inputs.chat, lessons[name], self.reporter, f"Baselines, {titles[name]} contexts"
                    )
                    for name in SETS[1:]
                }
            with times("training"):
                trainer = new_trainer(inputs, compressor, lessons["train"])
                times.replace_earlier("training", self._train(trainer, judges["heldout"], key))
            with times("evaluation"):
                trainer.take_best()
                figures: dict[str, Any] = {name: judge.figures(compressor) for name, judge in judges.items()}
            config = inputs.config
            trained = {
                "contexts": len(lessons["train"]),
                "step": trainer.best_step,
                "steps": config.steps,
                "objective": config.objective,
                "template_arguments": config.template_arguments,
                "segments": config.segments,
                "backprop_segments": config.backprop_segments,
            }
            short = {name: {k: v for k, v in of_set.items() if k != "contexts"} for name, of_set in figures.items()}
            base = base_name(inputs.model) or config.model
            save_compressor(folder.path / FOLDER, compressor, marks, base, trained, short)
        finally:
            if compressor.lora is not None:
                compressor.lora.detach()
        figures |= {
            "summary_tokens": inputs.form.tokens,
            "best_step": trainer.best_step,
            "contexts": {name: len(of_set) for name, of_set in lessons.items()},
            "skipped": inputs.skipped,
            "seconds": times.total,
            "stages": times.seconds,
        }
        folder.finish(figures)
        return figures

    def _train(self, trainer: CompressorTrainer, judge: Judge, key: str) -> float:
        """Train to the last step, from the checkpoint if there is one.

        Returns:
            Seconds that earlier calls spent on the steps before the checkpoint.
        """
        config, folder, compressor = self.inputs.config, self.folder, trainer.compressor
        checkpoints = Checkpoints(folder.checkpoint, key, reporter=self.reporter)
        if trainer.load(checkpoints):
            self.reporter.message(f"Resuming from step {trainer.step}.")
        seconds_before = folder.drop_metrics_after(trainer.step)
        try:
            with (
                folder.metrics.open("a", encoding="utf-8") as metrics,
                self.reporter.progress("Training", config.steps, "step") as advance,
            ):
                advance(trainer.step)
                if self._is_judged(trainer.step) and trainer.judged_step < trainer.step:  # stopped between the two
                    trainer.judged(judge.kl(compressor))
                while trainer.step < config.steps:
                    report: StepReport = trainer.train_step()
                    record = {"stage": "training", **asdict(report)}
                    figures = {"loss": report.loss}
                    if self._is_judged(report.step):
                        figures["heldout_kl"] = record["heldout_kl"] = judge.kl(compressor)
                        trainer.judged(figures["heldout_kl"])
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    advance(1, **figures)
                    if report.step % config.checkpoint_every == 0:
                        trainer.save(checkpoints)
            trainer.save(checkpoints)
        except KeyboardInterrupt as stop:
            trainer.save(checkpoints)
            raise Interrupted("step", trainer.saved_step, config.steps, folder.path, signal_of(stop)) from None
        return seconds_before

    def _is_judged(self, step: int) -> bool:
        """Whether the state after this step is judged on held-out contexts."""
        config = self.inputs.config
        return step > 0 and (step % config.evaluate_every == 0 or step == config.steps)
