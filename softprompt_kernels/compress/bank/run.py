"""Many contexts into a bank of prompts over one frozen model.

    contexts → for each: inputs → context → answers → baselines → closed form
             → refinement of several contexts at once → training in one batch
             → for each: evaluation → saving → compared answers

The model is loaded once. Each context has a run folder of its own, with the files of a single run. Contexts come in
lots of `contexts_together`: one lot is finished before the next begins. A captured context is released before the next
one is captured, so memory does not grow with their number but for prompts and moments of a lot.

A context that cannot be compressed is skipped with its reason, and the others go on. The same call resumes: finished
contexts are left as they are, and a training that is under way goes on with the contexts that are in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from softprompt_kernels.compress.bank.contexts import context_config
from softprompt_kernels.compress.bank.folder import BankFolder
from softprompt_kernels.compress.bank.matching import JointMatching, hollow
from softprompt_kernels.compress.bank.summary import bank_summary, counted
from softprompt_kernels.compress.bank.trainer import BankTrainer, Member, stored_members
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.trainer import Prompt, StepReport
from softprompt_kernels.compress.evaluate.distance import TokenDistances, distance
from softprompt_kernels.compress.inputs import Loaded, load_inputs
from softprompt_kernels.compress.matching.match import Matching
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.lock import check_unlocked, locked
from softprompt_kernels.compress.process.signals import signal_of, signals_as_interrupts
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Advance, Reporter, SilentReporter
from softprompt_kernels.compress.run import Run, begin, conclude, learn
from softprompt_kernels.compress.sources.contexts import NamedContext, read_contexts
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.stage_times import StageTimes
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teaching import Taught, Teaching
from softprompt_kernels.compress.tracking.tracker import Tracker
from softprompt_kernels.compress.training import Trained, trainer_of
from softprompt_kernels.errors import SoftPromptError, is_out_of_memory
from softprompt_kernels.models import head_of, prefix_of
from softprompt_kernels.prompts import Prefix


@own_torch_modes()
def compress_bank(
    config: CompressConfig, reporter: Reporter | None = None, loaded: Loaded | None = None
) -> dict[str, Any]:
    """Compress each context of a folder or of a file of JSON Lines.

    Args:
        config: of every run; `context` names the folder or the file.
        reporter: receives the progress.
        loaded: as in `load_inputs`.

    Returns:
        The summary of the bank: `contexts`, evaluation.json of each by name; `skipped`, the reason by name; `heldout`,
        mean and spread; `seconds`. It is in bank.json too.

    Raises:
        SoftPromptError: the contexts or the model cannot be read, the folder holds something else, or no context could
            be compressed.
        Interrupted: as `compress`, during the training. KeyboardInterrupt: in another stage.
    """
    reporter = reporter or SilentReporter()
    ranks.check_alone("many contexts")
    check_config(config)
    with signals_as_interrupts():
        check_unlocked(config.output)
        contexts, skipped = read_contexts(config.context)
        loaded = loaded or load_model(config.model, config.dtype, config.device)
        with locked(config.output):
            folder = BankFolder(config.output)
            folder.claim(config)
            return _Bank(config, folder, loaded, contexts, dict(skipped), reporter).run()


def check_config(config: CompressConfig) -> None:
    """Raise SoftPromptError for what is not there for many contexts."""
    for name in ("rounds", "segment_tokens", "save_best", "patience", "keep_checkpoints"):
        value, default = getattr(config, name), CompressConfig.model_fields[name].default
        if value != default:
            raise SoftPromptError(f"{name}: got {value} for many contexts, accepted is {default}")
    if config.track is not None:
        raise SoftPromptError(
            f"track: got {config.track} for many contexts, accepted is none; metrics.jsonl of each run has the steps"
        )


@dataclass(eq=False)
class _Part:
    """A context of a lot, after its baselines."""

    run: Run
    times: StageTimes
    taught: Taught
    distances: dict[str, dict[str, TokenDistances]]
    prompt: Prompt | None
    students: dict[str, Prefix] = field(default_factory=dict)
    steps: int = 0


@dataclass(eq=False)
class _Bank:
    """The stages of a bank."""

    config: CompressConfig
    folder: BankFolder
    loaded: Loaded
    contexts: list[NamedContext]
    skipped: dict[str, str]
    reporter: Reporter
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        for name, reason in self.skipped.items():
            self.reporter.message(f"Skipping {name}: {reason}")
        waiting = {context.name: context for context in self.contexts}
        while waiting:
            under_way = self._under_way(waiting)
            lot = [waiting[name] for name in under_way or waiting]
            with ExitStack() as locks:
                parts = self._prepare(lot, len(under_way) or self.config.contexts_together, locks)
                if self.config.steps and parts:
                    if not under_way:
                        self.folder.checkpoint.unlink(missing_ok=True)
                    self._train(parts)
                self._conclude(parts)
            self.folder.checkpoint.unlink(missing_ok=True)  # of contexts that are all finished or skipped
            done = {*self.finished, *self.skipped}
            waiting = {name: context for name, context in waiting.items() if name not in done}
        if not self.finished:
            last = list(self.skipped.items())[-3:]  # which were tried; those before could not be read
            reasons = "; ".join(f"{name}: {reason}" for name, reason in last)
            raise SoftPromptError(f"context: none of the {len(self.skipped)} contexts could be compressed; {reasons}")
        return self._write_summary()

    def _write_summary(self) -> dict[str, Any]:
        order = [context.name for context in self.contexts if context.name in self.finished]
        finished = {name: self.finished[name] for name in order}
        seconds = sum(float(figures["seconds"]) for figures in finished.values())
        summary = bank_summary(finished, self.skipped, seconds)
        self.folder.write({"config": (self.folder.read() or {}).get("config"), **summary})
        return summary

    def _skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        self.reporter.message(f"Skipping {name}: {reason}")

    @contextmanager
    def _skipping(self, name: str) -> Iterator[None]:
        """What is raised for one context skips it."""
        try:
            yield
        except SoftPromptError as error:
            self._skip(name, str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._skip(name, "out of memory")

    def _under_way(self, waiting: Mapping[str, NamedContext]) -> list[str]:
        """The contexts whose training is under way."""
        stored = stored_members(self.folder.checkpoint)
        open_runs = [name for name in stored if self.folder.run(name).read_evaluation() is None]
        known = {*waiting, *self.skipped, *self.finished}
        if open_runs and not known.intersection(open_runs):
            raise SoftPromptError(
                f"context: {self.config.context} has none of the contexts whose training is under way in "
                f"{self.folder.path}: {', '.join(open_runs)}; give them again, or choose another output"
            )
        return [name for name in open_runs if name in waiting]

    def _prepare(self, lot: Sequence[NamedContext], most: int, locks: ExitStack) -> dict[str, _Part]:
        """The first `most` contexts of a lot that are not finished, with their prompts before the training."""
        config, parts = self.config, dict[str, _Part]()
        matching = JointMatching(Matching(config.tokens, config.matching_steps, config.frozen), self.reporter)
        for context in lot:
            if len(parts) == most:
                break
            name, number = context.name, self.contexts.index(context) + 1
            with self._skipping(name):
                part = self._learn(context, f"context {number} of {len(self.contexts)}", locks, matching)
                if part is not None:
                    parts[name] = part
        matching.flush()
        for name, reason in matching.failed.items():
            self._skip(name, reason)
            del parts[name]
        for part in parts.values():
            if part.prompt is None:
                with part.times("matching"):
                    part.prompt, seconds = matching.prompt(part.run)
                    part.times.replace_earlier("matching", seconds)
            part.students = part.run.initial_student(part.prompt)
        return parts

    def _learn(self, context: NamedContext, title: str, locks: ExitStack, matching: JointMatching) -> _Part | None:
        """The stages of a context up to its closed form; None if it is finished."""
        folder, times = self.folder.run(context.name), StageTimes()
        own = context_config(self.config, context, self.folder.sources, folder.path)
        with times("load"):
            inputs = load_inputs(own, self.loaded)
        reporter = Named(self.reporter, context.name)
        with ExitStack() as lock:  # of a context that is finished, or skipped, it is released here
            lock.enter_context(locked(folder.path))
            figures = begin(inputs, folder, reporter, times)
            if figures is not None:
                self.finished[context.name] = figures
                return None
            self.reporter.message(f"{context.name}: {title}, {inputs.context_tokens} tokens")
            run, taught, distances, prompt = learn(inputs, folder, reporter, times, Tracker(own, folder, reporter))
            locks.push(lock.pop_all())
        if prompt is None:
            matching.add(context.name, run, taught.rows)
        # The captured context and the teacher's states are large. The states are read again when they are needed.
        light = replace(run, context=hollow(run.context))
        return _Part(light, times, replace(taught, states={}, rows=None), distances, prompt)

    def _train(self, parts: dict[str, _Part]) -> None:
        """Train the prompts of a lot to their last steps, from the checkpoint if there is one."""
        config, checkpoint = self.config, self.folder.checkpoint
        model = self.loaded[0]
        objective = next(iter(parts.values())).run.inputs.objective
        members = {name: self._member(part) for name, part in parts.items()}
        trainer = BankTrainer(model, objective, members, config.micro_batch_size)
        if checkpoint.exists():
            trainer.load(checkpoint)
            self.reporter.message(f"Resuming from step {trainer.step}.")
        for name, part in parts.items():
            left = members[name].left
            part.run.folder.drop_metrics_after(trainer.step if left is None else left)
        evaluated = parts if config.evaluate_every else {}
        teacher = {name: self._taught(part.run).states["heldout"] for name, part in evaluated.items()}
        try:
            with ExitStack() as files:
                metrics = {
                    name: files.enter_context(part.run.folder.metrics.open("a", encoding="utf-8"))
                    for name, part in parts.items()
                }
                title = f"Training of {counted(len(parts))}"
                advance = files.enter_context(self.reporter.progress(title, config.steps, "step"))
                advance(trainer.step)
                while trainer.step < config.steps and trainer.training:
                    reports = trainer.train_step()
                    for name, report in reports.items():
                        record = self._record(parts[name], report, teacher.get(name))
                        metrics[name].write(json.dumps(record) + "\n")
                        metrics[name].flush()
                        if members[name].left is not None:
                            self.reporter.message(f"{name}: converged at step {report.step} of {config.steps}.")
                    mean = sum(report.loss for report in reports.values()) / max(1, len(reports))
                    advance(1, loss=mean, contexts=len(trainer.training))
                    if trainer.step % config.checkpoint_every == 0:
                        trainer.save(checkpoint)
                advance(config.steps - trainer.step)
            trainer.save(checkpoint)
        except KeyboardInterrupt as stop:
            trainer.save(checkpoint)
            raise Interrupted("step", trainer.saved_step, config.steps, self.folder.path, signal_of(stop)) from None
        for name, member in members.items():
            parts[name].steps = trainer.step if member.left is None else member.left
            if member.failed is not None:
                self._skip(name, member.failed)
                del parts[name]

    def _member(self, part: _Part) -> Member:
        config, run = self.config, part.run
        assert part.prompt is not None
        trainer = trainer_of(run.inputs, part.prompt, part.taught)
        plain = config.objective == "kl" and (config.nll_weight, config.loss_temperature) == (0, 1)
        enough = None
        if config.converged and plain and config.token_weights == "uniform":
            enough = config.converged * part.distances["train"]["none"].mean().kl
        return Member(trainer, run.key, enough)

    def _record(self, part: _Part, report: StepReport, teacher: Sequence[Tensor] | None) -> dict[str, Any]:
        """The line of a step in metrics.jsonl. `teacher` has the states of held-out examples, if they are evaluated."""
        record = {"stage": "training", **asdict(report)}
        if teacher is not None and report.step % self.config.evaluate_every == 0:
            model = self.loaded[0]
            assert part.prompt is not None
            prefix = prefix_of(model, part.prompt).detach()
            student = hidden_states(model, prefix, part.taught.examples["heldout"], SilentReporter(), "")
            record["heldout_kl"] = distance(head_of(model), student, teacher).kl
        return record

    def _taught(self, run: Run) -> Taught:
        """What the teacher left, read from the folder."""
        return Teaching(run.inputs, run.folder, run.context, SilentReporter(), matched=True).teach()

    def _conclude(self, parts: Mapping[str, _Part]) -> None:
        """Evaluate and save the prompts of a lot."""
        for name, part in parts.items():
            assert part.prompt is not None
            run, times = part.run, part.times
            if self.config.steps:
                with times("training"):
                    times.replace_earlier("training", run.folder.drop_metrics_after(part.steps))
            with self._skipping(name):
                start = time.perf_counter()
                taught = self._taught(run)
                self.finished[name] = conclude(
                    run,
                    taught,
                    part.distances,
                    part.prompt,
                    part.students,
                    times,
                    Trained(0.0, part.steps, part.steps, None),
                    steps=part.steps,
                )
                self._write_summary()
                recovered, seconds = self.finished[name]["heldout"]["recovered"], time.perf_counter() - start
                self.reporter.message(f"{name}: recovered {recovered:.3f}, evaluated in {seconds:.1f} s")


class Named:
    """A reporter of the stages of one context among several.

    Args:
        reporter: receives them with the name of the context.
        name: of the context.
    """

    def __init__(self, reporter: Reporter, name: str) -> None:
        self.reporter, self.name = reporter, name

    def message(self, text: str) -> None:
        """Show a line, with the name."""
        self.reporter.message(f"{self.name}: {text}")

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """A stage, with the name. Arguments as in `Reporter.progress`."""
        with self.reporter.progress(f"{self.name}: {description}", total, unit) as advance:
            yield advance
