"""Sequential compression: a text of any length, read segment by segment, with a prompt as the state.

    replaced:     teacher of segment i reads [σ_{i−1} ; segment i],            σ_i: k tokens that stand for both
    accumulated:  teacher of segment i reads [σ_1 ; … ; σ_{i−1} ; segment i],  σ_i: k tokens more, for the segment

Cost: n segments take the time of n runs, each with a context of k + S tokens (replaced), or up to n·k + S tokens
(accumulated). Memory is that of one of them.

    output/                       as in a run, without checkpoint and metrics
    output/segments/0001/, …      the folder of each segment; see segment_run.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from softprompt_kernels.compress.compared_answers import compared_answers, prompt_answers
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.evaluate.details import Details, write_details
from softprompt_kernels.compress.evaluate.distance import summary
from softprompt_kernels.compress.evaluate.example_details import example_details
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import CHAT_FILE, Loaded, check_same_run, identity, sha256
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.interrupted import Interrupted
from softprompt_kernels.compress.process.lock import check_unlocked, locked
from softprompt_kernels.compress.process.signals import signals_as_interrupts
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.report.versions import made_with
from softprompt_kernels.compress.reporter import Advance, Reporter, SilentReporter
from softprompt_kernels.compress.run import save_prompt, write_report
from softprompt_kernels.compress.sequential.asked import delete_asked
from softprompt_kernels.compress.sequential.evaluation import evaluate, segment_figures
from softprompt_kernels.compress.sequential.long_text import LongText, load_long_text
from softprompt_kernels.compress.sequential.replay import Replayed, read
from softprompt_kernels.compress.sequential.segment_run import DONE, REPLAY, SegmentRun, tidy
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.stage_times import StageTimes
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
from softprompt_kernels.compress.teaching import Replay
from softprompt_kernels.compress.tracking.service import check_service
from softprompt_kernels.compress.tracking.tracker import tracked
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import KVPrompt, Prefix, check_destination, load


@own_torch_modes()
def compress_segments(
    config: CompressConfig, reporter: Reporter | None = None, loaded: Loaded | None = None
) -> dict[str, Any]:
    """A long text into a soft prompt, segment by segment. Results and errors as `compress` in start.py.

    Args:
        config: of the run, with `segment_tokens`.
        reporter: receives the progress; None reports nothing.
        loaded: as in `load_inputs`.

    Returns:
        As `compress`, with "segments": see `segment_figures` in evaluation.py.
    """
    with ranks.started(), signals_as_interrupts():
        first, times = ranks.is_first(), StageTimes()
        reporter = (reporter if first else None) or SilentReporter()
        if first:
            check_unlocked(config.output)
        check_service(config.track)
        with times("load"):
            text = load_long_text(config, loaded)
        check_same_run(text.inputs, reporter)
        with locked(config.output) if first else nullcontext():
            return _run(text, reporter, times)


def _run(text: LongText, reporter: Reporter, times: StageTimes) -> dict[str, Any]:
    inputs, folder = text.inputs, RunFolder(text.inputs.config.output)
    recorded = ranks.of_first(identity(inputs, folder.identity))
    if ranks.is_first():
        folder.claim(recorded, inputs.config.to_yaml(), made_with())
    ranks.barrier(folder.path / "run.json")
    finished = folder.read_evaluation()
    if ranks.of_first(finished is not None):
        reporter.message(f"The run in {folder.path} is already finished.")
        write_report(folder, reporter)
        _tidy(text, folder)
        return finished or {}
    if ranks.is_first():
        write_text(folder.path / CHAT_FILE, inputs.chat.rendered_from)
        times.keep_in(folder.stages)
    check_destination(folder.prompt)
    prompt = _read_segments(text, folder, sha256(json.dumps(recorded, sort_keys=True)), reporter, times)
    figures = _evaluate(text, folder, prompt, reporter, times)
    write_report(folder, reporter)
    _tidy(text, folder)
    return figures


def _tidy(text: LongText, folder: RunFolder) -> None:
    """Delete what only an unfinished run needs, also what one that was killed has left."""
    if not ranks.is_first():
        return
    for segment in text.segments:
        delete_asked(segment_folder(folder, segment.number))
        if segment.number < len(text.segments):
            _delete_earlier(text, folder, segment.number)


def _delete_earlier(text: LongText, folder: RunFolder, number: int) -> None:
    """Delete what only the segment after this one needs."""
    shutil.rmtree(segment_folder(folder, number) / REPLAY, ignore_errors=True)
    if text.inputs.config.state == "accumulated":  # the next prompt begins with this one
        shutil.rmtree(segment_folder(folder, number) / "prompt", ignore_errors=True)


def segment_folder(folder: RunFolder, number: int) -> Path:
    """The folder of a segment, counted from 1."""
    return folder.path / "segments" / f"{number:04d}"


def _read_segments(text: LongText, folder: RunFolder, key: str, reporter: Reporter, times: StageTimes) -> KVPrompt:
    """The prompt after the last segment. Segments that are finished are read back."""
    inputs, last = text.inputs, len(text.segments)
    prompt: KVPrompt | None = None
    done: int = ranks.of_first(next((n for n in range(last, 0, -1) if (segment_folder(folder, n) / DONE).exists()), 0))
    if done:
        found, _ = load(segment_folder(folder, done) / "prompt", inputs.model, inputs.tokenizer)
        prompt = cast(KVPrompt, found)
        if ranks.is_first():
            tidy(RunFolder(segment_folder(folder, done)))
        reporter.message(f"{done} of {last} segments are done.")
    for segment in text.segments[done:]:
        number = segment.number
        own_key, own = sha256(f"{key} {number}"), RunFolder(segment_folder(folder, number))
        earlier = Replayed(Replay((), None), ())
        if number > 1:
            before = sha256(f"{key} {number - 1}")
            replayed = segment_folder(folder, number - 1) / REPLAY
            earlier = read(replayed, before, inputs.objective, inputs.config.steps > 0)
        of_segment = text.segment_inputs(number - 1)
        counts = f"{segment.tokens} tokens, {len(of_segment.train)} queries, {len(earlier.segments)} about earlier ones"
        reporter.message(f"Segment {number} of {last}: {counts}")
        own.path.mkdir(parents=True, exist_ok=True)
        tracking = inputs.config if ranks.is_first() else inputs.config.model_copy(update={"track": None})
        with tracked(tracking, own, reporter) as tracker, _named(f"segment {number} of {last}", folder):
            in_segment = _Numbered(reporter, f"{number}/{last}")
            run = SegmentRun(of_segment, number, last, own, own_key, prompt, earlier, in_segment, times, tracker)
            prompt = run.run()
            tracker.finish({})
        if number > 1 and ranks.is_first():
            _delete_earlier(text, folder, number - 1)
    assert prompt is not None, "a text has a segment"
    return prompt


def _evaluate(
    text: LongText, folder: RunFolder, prompt: KVPrompt, reporter: Reporter, times: StageTimes
) -> dict[str, Any]:
    """Measure the final prompt, save it and write evaluation.json."""
    inputs, config = text.inputs, text.inputs.config
    folders = [segment_folder(folder, segment.number) for segment in text.segments]
    with times("evaluation"):
        final = prefix_of(inputs.model, prompt).detach()
        whole = capture_context(inputs.model, inputs.context_ids) if text.fits else None
        students: dict[str, Prefix | None] = {"none": no_context_prefix(inputs.model, inputs.chat)}
        if prompt.length < inputs.context_tokens:
            students["truncated"] = capture_context(inputs.model, inputs.context_ids[:, : prompt.length])
        students["prompt"] = final
        found = evaluate(inputs, folders, students, whole, reporter)
        del whole
        done = [json.loads((path / DONE).read_text(encoding="utf-8")) for path in folders]
        figures: dict[str, Any] = {
            "context_tokens": inputs.context_tokens,
            "prompt_tokens": prompt.length,
            "ratio": inputs.context_tokens / prompt.length,
            **{name: summary({k: v.mean() for k, v in of_set.distances.items()}) for name, of_set in found.items()},
            "segments": segment_figures(found["heldout"], done, config.state, text.fits),
        }
        if ranks.is_first():
            made = {"segments": len(text.segments), "state": config.state}
            save_prompt(inputs, folder.prompt, prompt, config.steps, figures["heldout"], **made)
    with times("answers_compared"):
        asked = {name: of_set.queries for name, of_set in found.items() if name != "train"}
        shown = replace(inputs, heldout=tuple(asked["heldout"]), test=tuple(asked.get("test", ())))
        answers = prompt_answers(shown, final, reporter)
        if not ranks.is_first():
            return figures
        examples = {name: of_set.examples for name, of_set in found.items()}
        write_text(folder.answers, compared_answers(shown, examples, answers))
        ends = end_tokens(inputs.model, inputs.chat)
        details = {
            name: example_details(
                inputs.tokenizer, of_set.queries, of_set.examples, of_set.distances, ends, answers.get(name)
            )
            for name, of_set in found.items()
        }
        write_details(folder.details, Details(sets=details))
    figures |= {"seconds": times.total, "stages": times.seconds}
    folder.finish(figures)
    return figures


@contextmanager
def _named(where: str, folder: RunFolder) -> Iterator[None]:
    """An interrupted segment is named, with the folder of the whole run."""
    try:
        yield
    except Interrupted as stop:
        stop.where, stop.output = f"in {where}, {stop.where}", folder.path
        stop.args = (f"Stopped {stop.where}; saved in {stop.output}",)
        raise


class _Numbered:
    """A reporter that puts the number of the segment before the name of a stage."""

    def __init__(self, reporter: Reporter, number: str) -> None:
        self.reporter, self.number = reporter, number

    def message(self, text: str) -> None:
        """As the reporter's."""
        self.reporter.message(text)

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """As the reporter's, under a numbered description."""
        return self.reporter.progress(f"{self.number} {description}", total, unit)
