"""One compression, from the text to the saved prompt.

    inputs → folder → context → answers → baselines → matching → training → evaluation → saving → compared answers →
    details → figures → curves → report

Each stage stores its result in the run's folder. After an interruption the same call resumes with what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from softprompt_kernels.compress.compared_answers import compared_answers, prompt_answers
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.distill.trainer import Prompt
from softprompt_kernels.compress.evaluate.baselines import TOKEN_BASELINES, baseline_prefixes
from softprompt_kernels.compress.evaluate.details import Details, write_details
from softprompt_kernels.compress.evaluate.distance import (
    Distance,
    TokenDistances,
    check_context_matters,
    measure_tokens,
    summary,
)
from softprompt_kernels.compress.evaluate.example_details import error_rows, example_details
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.initial_prompt import initial_baseline, initial_prompt, matched_prompt
from softprompt_kernels.compress.inputs import (
    CHAT_FILE,
    Loaded,
    RunInputs,
    check_same_run,
    identity,
    load_inputs,
    sha256,
)
from softprompt_kernels.compress.long_context.storage import plan_context
from softprompt_kernels.compress.matching.match import (
    Matching,
    match,
    stored_error,
    stored_layers,
    stored_match,
    stored_seconds,
)
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.lock import check_unlocked, locked
from softprompt_kernels.compress.process.signals import signal_of, signals_as_interrupts
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.report.curves import save_curves
from softprompt_kernels.compress.report.html.page import save_report
from softprompt_kernels.compress.report.html.run_data import read_run
from softprompt_kernels.compress.report.table import SETS
from softprompt_kernels.compress.report.versions import made_with
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.stage_times import StageTimes
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.compress.teacher.rows import Rows, delete_rows
from softprompt_kernels.compress.teaching import Taught, Teaching
from softprompt_kernels.compress.tracking.service import check_service
from softprompt_kernels.compress.tracking.tracker import Tracker, tracked
from softprompt_kernels.compress.training import Trained, Training
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import KVPrompt, Prefix, check_destination, save


@own_torch_modes()
def compress_one(
    config: CompressConfig, reporter: Reporter | None = None, loaded: Loaded | None = None
) -> dict[str, Any]:
    """One context into a soft prompt. Results and errors as `compress` in start.py.

    Args:
        config: the configuration of the run.
        reporter: receives the progress; None reports nothing.
        loaded: as in `load_inputs`.
    """
    if config.segment_tokens is not None:
        raise SoftPromptError(
            f"segment_tokens: got {config.segment_tokens}, accepted is none: this compresses in one piece"
        )
    with ranks.started(), signals_as_interrupts():
        first, times = ranks.is_first(), StageTimes()
        reporter = (reporter if first else None) or SilentReporter()
        if first:
            check_unlocked(config.output)
        check_service(config.track)
        with times("load"):
            inputs = load_inputs(config, loaded)
        check_same_run(inputs, reporter)
        with locked(config.output) if first else nullcontext():
            return run_stages(inputs, reporter, times)


def run_stages(inputs: RunInputs, reporter: Reporter, times: StageTimes) -> dict[str, Any]:
    """The stages of a run after its inputs are loaded. Arguments and result are those of `compress`."""
    config, folder = inputs.config, RunFolder(inputs.config.output)
    figures = begin(inputs, folder, reporter, times)
    if figures is not None:
        reporter.message(f"The run in {folder.path} is already finished.")
    else:
        tracking = config if ranks.is_first() else config.model_copy(update={"track": None})
        with tracked(tracking, folder, reporter) as tracker:
            figures = _new_figures(inputs, folder, reporter, times, tracker)
            tracker.finish(figures)
    draw_curves(folder, figures, reporter)
    write_report(folder, reporter)
    return figures


def begin(inputs: RunInputs, folder: RunFolder, reporter: Reporter, times: StageTimes) -> dict[str, Any] | None:
    """Make the folder that of the run.

    Returns:
        The content of evaluation.json if the run is finished already, else None.

    Raises:
        SoftPromptError: the folder holds something else.
    """
    if ranks.is_first():
        folder.claim(identity(inputs, folder.identity), inputs.config.to_yaml(), made_with())
    ranks.barrier(folder.path / "run.json")
    finished = folder.read_evaluation()
    if ranks.of_first(finished is not None):
        return finished or {}
    if ranks.is_first():
        write_text(folder.path / CHAT_FILE, inputs.chat.rendered_from)
        times.keep_in(folder.stages)
    if remark := inputs.remark:
        reporter.message(remark)
    check_destination(folder.prompt)
    return None


def _new_figures(
    inputs: RunInputs, folder: RunFolder, reporter: Reporter, times: StageTimes, tracker: Tracker
) -> dict[str, Any]:
    """The content of evaluation.json, after all stages of a run that is not finished."""
    run, taught, distances, prompt = learn(inputs, folder, reporter, times, tracker)
    if prompt is None:
        with times("matching"):
            prompt, seconds_before = run.match(taught.rows)
            times.replace_earlier("matching", seconds_before)
    students = run.initial_student(prompt)
    with times("training"):
        training = Training(inputs, folder, run.context, prompt, taught, run.key, reporter, tracker).run()
        times.replace_earlier("training", training.seconds_before)
    return conclude(run, taught, distances, prompt, students, times, training)


class Learnt(NamedTuple):
    """What a run has before its matching and its training.

    Args:
        run: the stages that follow.
        taught: what the teacher left.
        distances: of the baselines, by set and key.
        prompt: before the training; None if it is matched first.
    """

    run: Run
    taught: Taught
    distances: dict[str, dict[str, TokenDistances]]
    prompt: Prompt | None


def learn(inputs: RunInputs, folder: RunFolder, reporter: Reporter, times: StageTimes, tracker: Tracker) -> Learnt:
    """The stages from the captured context to the baselines.

    Raises:
        SoftPromptError: the context does not matter for the queries, or something is not finite.
    """
    with times("context"):
        folder.cache.mkdir(exist_ok=True)
        plan = plan_context(inputs, folder, folder.context, reporter)
        context = capture_context(inputs.model, inputs.context_ids, storage=plan.storage)
        prompt = None if inputs.config.init == "matched" else initial_prompt(inputs, context)
    run = Run(inputs, folder, context, reporter, tracker)
    with times("answers"):
        taught = Teaching(inputs, folder, context, reporter, run.matched).teach()
    with times("baselines"):
        distances = run.measure(run.baselines(), taught)
        for of_set in distances.values():
            check_context_matters(of_set["none"].mean().kl)
    return Learnt(run, taught, distances, prompt)


def conclude(
    run: Run,
    taught: Taught,
    distances: dict[str, dict[str, TokenDistances]],
    prompt: Prompt,
    students: Mapping[str, Prefix],
    times: StageTimes,
    training: Trained,
    **more: Any,
) -> dict[str, Any]:
    """The stages after the training.

    Args:
        run, taught, distances: from `learn`.
        prompt: trained.
        students: from `initial_student`, before the training.
        times: of the run.
        training: how it went.
        more: figures to add.

    Returns:
        The content of evaluation.json.
    """
    inputs, folder = run.inputs, run.folder
    with times("evaluation"):
        trained = prefix_of(inputs.model, prompt).detach()
        for name, of_set in run.measure({**students, "prompt": trained}, taught).items():
            distances[name] |= of_set
        figures = run.figures({name: _means(of_set) for name, of_set in distances.items()}, training)
        if ranks.is_first():
            save_prompt(inputs, folder.prompt, prompt, training.saved_step, figures["heldout"])
    with times("answers_compared"):
        answers = prompt_answers(inputs, trained, run.reporter)
        if not ranks.is_first():
            return figures
        write_text(folder.answers, compared_answers(inputs, taught.examples, answers))
        write_details(folder.details, run.details(taught, distances, answers))
    figures |= {**more, "seconds": times.total, "stages": times.seconds}
    folder.finish(figures)
    return figures


def draw_curves(folder: RunFolder, figures: Mapping[str, Any], reporter: Reporter) -> None:
    """Draw the curves of a finished run, unless they are there. A picture may fail, and the run stays finished."""
    if not ranks.is_first() or folder.curves.exists():
        return
    if not folder.has_metrics:  # no step was taken for a prompt in closed form
        return
    try:
        save_curves(folder.metrics, figures, folder.curves)
    except Exception as error:  # of matplotlib, of its settings and fonts, of the disk
        reporter.message(
            f"Warning: the curves could not be drawn ({_reason(error)}). The run is finished without them."
        )


def write_report(folder: RunFolder, reporter: Reporter) -> None:
    """Write the report of a finished run, unless it is there, or the run is of a version that kept no details."""
    if not ranks.is_first() or folder.report.exists() or not folder.details.exists():
        return
    try:
        save_report(read_run(folder.path), folder.report)
    except Exception as error:  # of plotly, of the disk, of a diagnosis of another version
        reporter.message(
            f"Warning: the report could not be written ({_reason(error)}). The run is finished without it."
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _means(students: Mapping[str, TokenDistances]) -> dict[str, Distance]:
    return {name: found.mean() for name, found in students.items()}


@dataclass(frozen=True, eq=False)
class Run:
    """The stages after the initial prompt, and what they share.

    Args:
        inputs: config, model, queries and so on.
        folder: where results are stored.
        context: the captured context.
        reporter: receives the progress.
        tracker: receives the steps.
    """

    inputs: RunInputs
    folder: RunFolder
    context: Prefix
    reporter: Reporter
    tracker: Tracker

    @cached_property
    def key(self) -> str:
        """A digest of everything that decides the result of the run."""
        return sha256(json.dumps(self.folder.identity, sort_keys=True))

    def baselines(self) -> dict[str, Prefix | None]:
        """The prefixes that the prompt has to beat, by key."""
        return baseline_prefixes(self.inputs.model, self.inputs.chat, self.context, self.inputs.config.tokens)

    def initial_student(self, prompt: Prompt) -> dict[str, Prefix]:
        """The prompt before training, as "initial"; nothing where it equals a baseline or is not trained."""
        if initial_baseline(self.inputs.config) != "initial":
            return {}
        prefix = prefix_of(self.inputs.model, prompt).detach()
        # Training changes the prompt in place.
        return {"initial": Prefix.of((key.clone(), value.clone()) for key, value in prefix.layers)}

    @property
    def matched(self) -> bool:
        """Whether the prompt is already matched, by an earlier call."""
        return stored_match(self.context, self.folder.cache, self.key) is not None

    def measure(self, students: Mapping[str, Prefix | None], taught: Taught) -> dict[str, dict[str, TokenDistances]]:
        """The distance of each student from the teacher at each token, on each set of examples.

        Baselines of chosen tokens, and the prompt before training, are not measured on the test set: they are there to
        be compared with on the held-out one.
        """
        titles, distances = dict(SETS), {}
        for name, examples in taught.evaluated.items():
            chosen = {k: v for k, v in students.items() if name != "test" or k not in (*TOKEN_BASELINES, "initial")}
            distances[name] = measure_tokens(
                self.inputs.model,
                self.context,
                chosen,
                examples,
                self.reporter,
                titles[name],
                teacher=taught.states[name],
            )
        return distances

    def match(self, rows: Rows | None) -> tuple[KVPrompt, float]:
        """The prompt that is fitted to the rows, group by group of the layers; finished groups are read back.

        Returns:
            The prompt, and the seconds that earlier calls spent on finished groups.
        """
        config, folder = self.inputs.config, self.folder
        seconds_before = stored_seconds(self.context, folder.cache, self.key)
        matched = stored_match(self.context, folder.cache, self.key)
        if ranks.of_first(matched is None):
            assert rows is not None, "the teacher leaves rows where nothing is matched"
            settings = Matching(config.tokens, config.matching_steps, config.frozen)
            folder.drop_metrics_after(config.steps)  # only a line that a crash cut off
            try:
                matched = match(
                    self.context,
                    rows,
                    settings,
                    reporter=self.reporter,
                    folder=folder.cache,
                    key=self.key,
                    record=self.record,
                    model=self.inputs.model,
                )
            except KeyboardInterrupt as stop:
                done = len(stored_layers(self.context, folder.cache, self.key))
                raise Interrupted("layer", done, self.context.num_layers, folder.path, signal_of(stop)) from None
        assert matched is not None, "all ranks see the same folder"
        if ranks.is_first():
            delete_rows(folder.cache)
        return matched_prompt(self.inputs, self.context, matched), seconds_before

    def record(self, record: Mapping[str, Any]) -> None:
        """Keep the record of a step of matching."""
        self.folder.add_metrics(record)
        self.tracker.log(record)

    def figures(self, distances: Mapping[str, Mapping[str, Distance]], training: Trained) -> dict[str, Any]:
        """The content of evaluation.json, without the seconds."""
        inputs, config = self.inputs, self.inputs.config
        return {
            "context_tokens": inputs.context_tokens,
            "prompt_tokens": config.tokens,
            "ratio": inputs.context_tokens / config.tokens,
            "start": initial_baseline(config),
            **self.chosen(training),
            **{name: summary(of_set) for name, of_set in distances.items()},
        }

    def chosen(self, training: Trained) -> dict[str, Any]:
        """What was decided during the training, for evaluation.json; empty if nothing was."""
        config, changes = self.inputs.config, self.folder.changes
        if not (config.save_best or config.patience or changes):
            return {}
        figures = {"steps": training.steps, "of": config.steps, "saved_step": training.saved_step}
        best = {} if training.best_kl is None else {"best_heldout_kl": training.best_kl}
        return {"training": figures | best | ({"changes": changes} if changes else {})}

    def details(
        self,
        taught: Taught,
        distances: Mapping[str, Mapping[str, TokenDistances]],
        answers: Mapping[str, Sequence[str]],
    ) -> Details:
        """The content of details.json."""
        inputs, ends = self.inputs, end_tokens(self.inputs.model, self.inputs.chat)
        sets = {
            name: example_details(
                inputs.tokenizer, taught.queries[name], examples, distances[name], ends, answers.get(name)
            )
            for name, examples in taught.evaluated.items()
        }
        return Details(sets=sets, match_error=error_rows(stored_error(self.context, self.folder.cache, self.key)))


def save_prompt(
    inputs: RunInputs, path: Path, prompt: Prompt, steps: int, figures: Mapping[str, Any], **more: Any
) -> None:
    """Write the prompt of a run.

    Args:
        inputs: of the run.
        path: the folder of the prompt.
        prompt: to write.
        steps: of training that it has had.
        figures: on held-out queries.
        more: how it was made, beside objective, steps and initialisation.
    """
    config = inputs.config
    save(
        path,
        prompt,
        model=inputs.model,
        tokenizer=inputs.tokenizer,
        context={
            "sha256": sha256(inputs.text),
            "tokens": inputs.context_tokens,
            **({"template_arguments": config.template_arguments} if config.template_arguments else {}),
        },
        objective={
            "name": config.objective,
            "nll_weight": config.nll_weight,
            "steps": steps,
            "init": config.init,
            **more,
        },
        figures=figures,
    )
