"""The training of a run: steps and rounds with their records, held-out figures and checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from softprompt_kernels.compress.distill.checkpoint import Checkpoints
from softprompt_kernels.compress.distill.on_policy import OnPolicy, parts
from softprompt_kernels.compress.distill.trainer import Prompt, Schedule, StepReport, Trainer
from softprompt_kernels.compress.evaluate.distance import measure
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.signals import signal_of
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.compress.tracking.tracker import Tracker
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import Prefix


@dataclass(frozen=True, eq=False)
class Training:
    """The training of one prompt.

    Args:
        inputs: config, model, queries and so on.
        folder: where results are stored.
        context: the captured context.
        prompt: trained in place.
        taught: what the teacher left.
        key: a digest of everything that decides the result of the run.
        reporter: receives the progress.
        tracker: receives the steps.
    """

    inputs: RunInputs
    folder: RunFolder
    context: Prefix
    prompt: Prompt
    taught: Taught
    key: str
    reporter: Reporter
    tracker: Tracker

    def run(self) -> float:
        """Train to the last step, from the checkpoint if there is one.

        Returns:
            Seconds that earlier calls spent on the steps before the checkpoint, and on rounds.
        """
        inputs, folder, config = self.inputs, self.folder, self.inputs.config
        prompt, taught = self.prompt, self.taught
        if config.steps == 0:
            return folder.drop_metrics_after(0)
        checkpoints = Checkpoints(folder.checkpoint, self.key, reporter=self.reporter)
        ranks.copy_first_([*prompt.parameters()])  # machines may differ in the last bits of its start
        trainer = self.trainer()
        if trainer.load(checkpoints) is not None:
            self.reporter.message(f"Resuming from step {trainer.step}.")
        on_policy = self.on_policy()
        seconds_before = folder.drop_metrics_after(trainer.step) + on_policy.seconds(config.rounds)
        heldout = taught.examples["heldout"]
        teacher = taught.states["heldout"] if config.evaluate_every else None

        def after_step(report: StepReport) -> None:
            record = {"stage": "training", **asdict(report), **({"round": part.round} if config.rounds else {})}
            if teacher is not None and report.step % config.evaluate_every == 0:
                students = {"prompt": prefix_of(inputs.model, prompt).detach()}
                measured = measure(inputs.model, self.context, students, heldout, SilentReporter(), "", teacher=teacher)
                record["heldout_kl"] = measured["prompt"].kl
            if ranks.is_first():
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
            self.tracker.log(record)
            figures = {"loss": report.loss}
            if "heldout_kl" in record:
                figures["heldout_kl"] = record["heldout_kl"]
            advance(1, **figures)
            if report.step % config.checkpoint_every == 0:
                trainer.save(checkpoints)

        try:
            with folder.metrics.open("a", encoding="utf-8") as metrics:
                for part in parts(config.steps, config.rounds):
                    if trainer.step >= part.last:
                        continue
                    if part.round:
                        at_round = trainer.step == part.first
                        if at_round:
                            trainer.save(checkpoints)
                        student = prefix_of(inputs.model, prompt).detach() if at_round else None
                        trainer.take(*on_policy.answers(part.round, student), config.student_share)
                    title = f"Training, part {part.round + 1} of {config.rounds + 1}" if config.rounds else "Training"
                    with self.reporter.progress(title, part.last - part.first, "step") as advance:
                        advance(trainer.step - part.first)
                        trainer.run(after_step, part.last)
            trainer.save(checkpoints)
        except KeyboardInterrupt as stop:
            trainer.save(checkpoints)
            raise Interrupted("step", trainer.saved_step, config.steps, folder.path, signal_of(stop)) from None
        return seconds_before

    def trainer(self) -> Trainer:
        """The trainer of the prompt, before the first step."""
        inputs, config = self.inputs, self.inputs.config
        return Trainer(
            inputs.model,
            self.prompt,
            self.taught.examples["train"],
            self.taught.targets,
            inputs.objective,
            Schedule(config.steps, config.learning_rate, config.warmup_steps),
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            relative=config.relative_learning_rate,
        )

    def on_policy(self) -> OnPolicy:
        """The rounds of the training."""
        inputs, config = self.inputs, self.inputs.config
        return OnPolicy(
            inputs.model,
            inputs.chat,
            self.context,
            inputs.train,
            inputs.objective,
            self.folder.rounds,
            self.key,
            config.new_tokens,
            config.sample_temperature,
            config.sample_batch,
            config.seed,
            self.reporter,
        )
