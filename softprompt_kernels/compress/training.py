"""The training of a run: steps and rounds with their records, held-out figures and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

from softprompt_kernels.compress.distill.checkpoint import Checkpoint, Checkpoints
from softprompt_kernels.compress.distill.on_policy import OnPolicy, Part, parts
from softprompt_kernels.compress.distill.progress import Progress, read_notes
from softprompt_kernels.compress.distill.trainer import Diverged, Prompt, Schedule, StepReport, Trainer
from softprompt_kernels.compress.evaluate.distance import measure
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.signals import signal_of
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.compress.tracking.tracker import Tracker
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import Prefix


class Trained(NamedTuple):
    """What a training leaves beside the prompt.

    Args:
        seconds_before: that earlier calls spent on the steps before the checkpoint, and on rounds.
        steps: that were taken.
        saved_step: the step whose prompt it is.
        best_kl: the lowest held-out KL of an evaluation during the training, nats per token; None without any.
    """

    seconds_before: float
    steps: int
    saved_step: int
    best_kl: float | None


@dataclass(eq=False)
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
    progress: Progress = field(default=Progress(), init=False)
    best_saved: int | None = field(default=None, init=False)  # the step of the prompt in `best_file`

    def run(self) -> Trained:
        """Train to the last step or a plateau, from the checkpoint if there is one.

        Raises:
            Interrupted: by a signal. The state is saved.
            SoftPromptError: the training has diverged. The last good state is saved, and the message says where.
        """
        folder, config = self.folder, self.inputs.config
        if config.steps == 0:
            return Trained(folder.drop_metrics_after(0), 0, 0, None)
        ranks.copy_first_([*self.prompt.parameters()])  # machines may differ in the last bits of its start
        trainer, on_policy = self.trainer, self.on_policy()
        pending = self.resume()
        seconds_before = folder.drop_metrics_after(self.progress.recorded) + on_policy.seconds(config.rounds)
        try:
            if self.chooses and self.progress.best_step is None:
                self.record(0, self.heldout_kl())
                self.save()
            for part in parts(config.steps, config.rounds):
                if self.stopped or self.progress.recorded >= part.last:
                    continue
                if part.round:
                    at_round = trainer.step == part.first
                    if at_round:
                        self.save()
                    student = prefix_of(self.inputs.model, self.prompt).detach() if at_round else None
                    trainer.take(*on_policy.answers(part.round, student), config.student_share)
                title = f"Training, part {part.round + 1} of {config.rounds + 1}" if config.rounds else "Training"
                with self.reporter.progress(title, part.last - part.first, "step") as advance:
                    advance(self.progress.recorded - part.first)
                    after_step = partial(self.after_step, advance, part)
                    if pending is None or not after_step(pending):
                        trainer.run(after_step, part.last)
                    pending = None
            self.save()
        except KeyboardInterrupt as stop:
            self.save()
            saved = trainer.saved_step or 0
            raise Interrupted("step", saved, config.steps, folder.path, signal_of(stop)) from None
        except Diverged as error:
            self.save()
            if ranks.is_first():
                folder.mark_diverged(trainer.saved_step or 0)
            raise SoftPromptError(
                f"{error}. The last good state, of step {trainer.saved_step or 0}, is in {folder.path}: the same "
                "command with a smaller learning_rate, or a smaller max_grad_norm, goes on from there"
            ) from error
        saved_step = self.take_best() if config.save_best else trainer.step
        return Trained(seconds_before, trainer.step, saved_step, self.progress.best_kl)

    def after_step(self, advance: Callable[..., None], part: Part, report: StepReport) -> bool:
        """Evaluate and record a step, and save it if it is time.

        Returns:
            Whether the training stops here, at a plateau.
        """
        config, last = self.inputs.config, report.step == self.inputs.config.steps
        record = {"stage": "training", **asdict(report), **({"round": part.round} if config.rounds else {})}
        figures = {"loss": report.loss}
        every = config.evaluate_every
        if every and (report.step % every == 0 or (last and self.chooses)):
            record["heldout_kl"] = figures["heldout_kl"] = self.heldout_kl()
        self.folder.add_metrics(record)
        self.record(report.step, figures.get("heldout_kl"))
        self.tracker.log(record)
        advance(1, **figures)
        best = config.save_best and self.progress.best_step == report.step
        if report.step % config.checkpoint_every == 0 or best or self.stopped:
            self.save()
        if self.stopped and not last:
            self.reporter.message(
                f"Stopped at step {report.step} of {config.steps}: no held-out KL of the last {config.patience} "
                f"evaluations was below {self.progress.best_kl:.4g}, that of step {self.progress.best_step}."
            )
        return self.stopped

    @property
    def chooses(self) -> bool:
        """Whether held-out evaluations decide something. The prompt before training is one of them then."""
        return self.inputs.config.save_best or self.inputs.config.patience > 0

    @property
    def stopped(self) -> bool:
        """Whether the held-out KL has reached a plateau."""
        return 0 < self.inputs.config.patience <= self.progress.waited

    def heldout_kl(self) -> float:
        """The KL of the prompt on the held-out set, nats per token."""
        model, examples = self.inputs.model, self.taught.examples["heldout"]
        students, teacher = {"prompt": prefix_of(model, self.prompt).detach()}, self.taught.states["heldout"]
        return measure(model, self.context, students, examples, SilentReporter(), "", teacher=teacher)["prompt"].kl

    def record(self, step: int, heldout_kl: float | None) -> None:
        """Remember that a step is in the metrics, and its evaluation if it has one."""
        self.progress = self.progress.after(step, heldout_kl)

    def save(self) -> None:
        """Write a checkpoint, and the best prompt after it if that is the one of this step.

        In this order the best prompt is always on disk: in its own file, or in the checkpoint of its step.
        """
        self.trainer.save(self.checkpoints, self.progress.notes(self.trainer.report))
        best_step, best_kl = self.progress.best_step, self.progress.best_kl
        if self.inputs.config.save_best and best_step == self.trainer.step and self.trainer.consistent:
            if self.best_saved != best_step and ranks.is_first():
                self.best_file.write(Checkpoint(best_step, dict(self.prompt.state_dict()), {"kl": repr(best_kl)}))
            self.best_saved = best_step

    def resume(self) -> StepReport | None:
        """Go to the newest checkpoint, if there is one.

        Returns:
            The report of its step, if that has yet to be recorded.
        """
        notes = self.trainer.load(self.checkpoints)
        if notes is None:
            return None
        self.reporter.message(f"Resuming from step {self.trainer.step}.")
        self.progress, pending = read_notes(notes, self.trainer.step)
        if self.inputs.config.save_best:
            self.resume_best()
        return pending

    def resume_best(self) -> None:
        """Make sure that the best prompt is on disk.

        Raises:
            SoftPromptError: it is not there, or damaged.
        """
        found, step, best_step = self.best_file.read(), self.trainer.step, self.progress.best_step
        if found is not None and found.step > step:  # the run has gone back to an earlier checkpoint
            self.best_saved = found.step
            self.progress = self.progress._replace(best_step=found.step, best_kl=float(found.notes["kl"]), waited=0)
        elif best_step == step:
            self.save()
        elif best_step is not None and (found is None or found.step != best_step):
            raise SoftPromptError(
                f"save_best: {self.folder.best} has not the prompt of step {best_step}, the best before step {step}; "
                f"delete {self.folder.checkpoint} to train again from the start"
            )

    def take_best(self) -> int:
        """Set the prompt to that of the best held-out evaluation; returns its step."""
        best_step = self.progress.best_step
        assert best_step is not None, "the prompt before training is evaluated"
        if best_step != self.trainer.step:
            ranks.barrier(self.folder.best)
            found = self.best_file.read()
            if found is None or found.step != best_step:
                raise SoftPromptError(f"save_best: {self.folder.best} has not the prompt of step {best_step} any more")
            self.prompt.load_state_dict(found.tensors)
        return best_step

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The last states of the training."""
        return Checkpoints(self.folder.checkpoint, self.key, self.inputs.config.keep_checkpoints, self.reporter)

    @cached_property
    def best_file(self) -> Checkpoints:
        """The prompt of the best held-out evaluation."""
        return Checkpoints(self.folder.best, self.key, 1, self.reporter)

    @cached_property
    def trainer(self) -> Trainer:
        """The trainer of the prompt, before the first step."""
        return trainer_of(self.inputs, self.prompt, self.taught)

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


def trainer_of(inputs: RunInputs, prompt: Prompt, taught: Taught) -> Trainer:
    """The trainer of a prompt as its configuration says, before the first step.

    Args:
        inputs: config, model and objective.
        prompt: trained in place.
        taught: what the teacher left.
    """
    config = inputs.config
    return Trainer(
        inputs.model,
        prompt,
        taught.examples["train"],
        taught.targets,
        inputs.objective,
        Schedule(config.steps, config.learning_rate, config.warmup_steps),
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        relative=config.relative_learning_rate,
    )
