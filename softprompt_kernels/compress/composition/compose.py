"""Prompts of several contexts joined to one, which is trained a little.

    runs → folder → teacher, document after document → baselines → training → evaluation → saving → compared answers →
    figures

Each stage stores its result in the folder of the composition, as in a run of `compress`. After an interruption the same
call resumes with what is stored. The runs are not changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.compared_answers import compared_answers, prompt_answers
from softprompt_kernels.compress.composition.documents import recorded_contexts
from softprompt_kernels.compress.composition.figures import (
    Measured,
    document_figures,
    mean_figures,
    pooled_figures,
)
from softprompt_kernels.compress.composition.join import beside_each_other
from softprompt_kernels.compress.composition.settings import composition_of
from softprompt_kernels.compress.composition.teaching import joined, teach
from softprompt_kernels.compress.composition.work import Work, prepare
from softprompt_kernels.compress.evaluate.distance import measure_tokens
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import CHAT_FILE, sha256
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.process.lock import check_unlocked, locked
from softprompt_kernels.compress.process.signals import signals_as_interrupts
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.report.versions import made_with
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.stage_times import StageTimes
from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
from softprompt_kernels.compress.teaching import Taught
from softprompt_kernels.compress.tracking.tracker import tracked
from softprompt_kernels.compress.training import Training
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import KVPrompt, Prefix, check_destination, save

TITLES = {"heldout": "held-out", "test": "test"}


@own_torch_modes()
def compose(
    runs: Sequence[str | Path], output: str | Path, *, reporter: Reporter | None = None, **options: Any
) -> dict[str, Any]:
    """Join the prompts of several runs to one, train it, and measure each document's queries behind it.

    Args:
        runs: folders of finished runs of `compress` with one model, two or more. The order is that of the prompts.
        output: folder of the composition.
        reporter: receives the progress; None reports nothing.
        options: of the training, by the names in `composition.settings.OPTIONS`, as fields of `CompressConfig`.

    Returns:
        The content of evaluation.json: "documents", each with the figures of its held-out and test queries; "mean",
        over documents; "heldout" and "test", over all their tokens. KL in nats per token.

    Raises:
        SoftPromptError: bad input. Most is found before anything is written.
        Interrupted, KeyboardInterrupt: as in `compress`.
    """
    ranks.check_alone("a composition")
    reporter, times = reporter or SilentReporter(), StageTimes()
    with signals_as_interrupts():
        check_unlocked(Path(output))
        composition = composition_of([Path(run) for run in runs], Path(output), options)
        with times("load"):
            work = prepare(composition)
        with locked(composition.config.output):
            return _stages(work, reporter, times)


def _stages(work: Work, reporter: Reporter, times: StageTimes) -> dict[str, Any]:
    """The stages after everything is loaded. The result is that of `compose`."""
    inputs, config = work.inputs, work.inputs.config
    folder, recorded = RunFolder(config.output), work.composition.sources[0].folder.identity
    same = {name: recorded.get(name) for name in ("model", "tokenizer", "dtype")}
    folder.claim({**work.composition.identity, **same}, work.composition.to_yaml(), made_with())
    if (finished := folder.read_evaluation()) is not None:
        reporter.message(f"The composition in {folder.path} is already finished.")
        return finished
    write_text(folder.path / CHAT_FILE, inputs.chat.rendered_from)
    if work.remark:
        reporter.message(work.remark)
    times.keep_in(folder.stages)
    check_destination(folder.prompt)

    run = _Run(work, folder, reporter)
    with times("answers"):
        run.teach()
    with times("baselines"):
        found = {name: run.measure(name, run.baselines(name)) for name in TITLES if run.numbers(name)}
        for of_set in found.values():
            for measured in of_set:
                document_figures(measured)  # raises where the context does not matter
    taught = joined(run.taught)
    with times("training"):
        times.replace_earlier("training", run.train(taught))
    with times("evaluation"):
        trained = run.trained
        for name, of_set in found.items():
            if config.steps:
                after = run.measure(name, {number: {"prompt": trained} for number in run.numbers(name)})
            else:
                after = [{"prompt": measured["joined"]} for measured in of_set]
            for measured, more in zip(of_set, after, strict=True):
                measured |= more
        figures = run.figures(found)
        run.save(figures)
    with times("answers_compared"):
        answers = prompt_answers(inputs, trained, reporter)
        write_text(folder.answers, compared_answers(inputs, taught.examples, answers))
    figures |= {"seconds": times.total, "stages": times.seconds}
    folder.finish(figures)
    return figures


@dataclass(eq=False)
class _Run:
    """The stages of a composition, and what they share.

    Args:
        work: what is loaded.
        folder: where results are stored.
        reporter: receives the progress.

    Attributes:
        taught: what the teacher of each document left.
    """

    work: Work
    folder: RunFolder
    reporter: Reporter
    taught: list[Taught] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = prefix_of(self.work.inputs.model, self.work.prompt).detach()
        # Training changes the prompt in place.
        self._joined = Prefix.of((key.clone(), value.clone()) for key, value in start.layers)

    @property
    def trained(self) -> Prefix:
        """The joined prompt as it is now."""
        return prefix_of(self.work.inputs.model, self.work.prompt).detach()

    def teach(self) -> None:
        """Let the teacher of each document answer, or read what it left. One captured context is held at a time."""
        inputs = self.work.inputs
        for number, document in enumerate(self.work.documents, 1):
            folder = RunFolder(self.folder.cache / f"document-{number}")
            context = capture_context(inputs.model, document.inputs.context_ids)
            self.taught.append(
                teach(
                    document, inputs.objective, inputs.config.steps, folder, context, self.work.unclear, self.reporter
                )
            )

    def numbers(self, of_set: str) -> list[int]:
        """The documents that have queries in a set."""
        return [number for number, taught in enumerate(self.taught) if taught.examples.get(of_set)]

    def baselines(self, of_set: str) -> dict[int, dict[str, Prefix | None]]:
        """What the trained prompt is compared with, by the numbers of the documents that have queries in a set."""
        numbers, model = self.numbers(of_set), self.work.inputs.model
        shared: dict[str, Prefix | None] = {}
        prefixes = [prefix_of(model, document.prompt).detach() for document in self.work.documents]
        if isinstance(self.work.prompt, KVPrompt):
            shared["naive"] = beside_each_other(prefixes)
        shared["joined"] = self._joined
        if self.work.fits_whole:
            shared["all"] = capture_context(model, self.work.inputs.context_ids)
        none = no_context_prefix(model, self.work.inputs.chat)
        return {number: {"none": none, "alone": prefixes[number], **shared} for number in numbers}

    def measure(self, of_set: str, students: Mapping[int, Mapping[str, Prefix | None]]) -> list[Measured]:
        """The distances of students from the teacher at each token, by document and student.

        Args:
            of_set: the set of queries.
            students: by the numbers of documents.
        """
        found = []
        for number, own in students.items():
            taught, name = self.taught[number], self.work.documents[number].source.name
            found.append(
                measure_tokens(
                    self.work.inputs.model,
                    self._joined,
                    own,
                    taught.examples[of_set],
                    self.reporter,
                    f"{TITLES[of_set]} ({name})",
                    teacher=taught.states[of_set],
                )
            )
        return found

    def train(self, taught: Taught) -> float:
        """Train the joined prompt; seconds of earlier calls, as `Training.run`."""
        inputs = self.work.inputs
        key = sha256(json.dumps(self.folder.identity, sort_keys=True))
        with tracked(inputs.config, self.folder, self.reporter) as tracker:
            # The captured context is for rounds, which a composition has none of.
            training = Training(
                inputs, self.folder, self._joined, self.work.prompt, taught, key, self.reporter, tracker
            )
            return training.run().seconds_before

    def figures(self, measured: dict[str, list[Measured]]) -> dict[str, Any]:
        """The content of evaluation.json, without the seconds."""
        composition, documents = self.work.composition, self.work.documents
        found: list[dict[str, Any]] = [
            {
                "name": document.source.name,
                "run": str(document.source.folder.path),
                "context_tokens": document.inputs.context_tokens,
                "prompt_tokens": tokens,
            }
            for document, tokens in zip(documents, composition.kept, strict=True)
        ]
        for name, of_set in measured.items():
            for number, one in zip(self.numbers(name), of_set, strict=True):
                found[number][name] = document_figures(one)
        context, prompt = sum(one["context_tokens"] for one in found), self.work.prompt.length
        return {
            "context_tokens": context,
            "prompt_tokens": prompt,
            "ratio": context / prompt,
            "steps": self.work.inputs.config.steps,
            "left_out": self.work.left_out,
            "documents": found,
            "mean": {name: mean_figures([one[name] for one in found if name in one]) for name in measured},
            **{name: pooled_figures(of_set) for name, of_set in measured.items()},
        }

    def save(self, figures: dict[str, Any]) -> None:
        """Write the prompt."""
        inputs, composition = self.work.inputs, self.work.composition
        save(
            self.folder.prompt,
            self.work.prompt,
            model=inputs.model,
            tokenizer=inputs.tokenizer,
            context=recorded_contexts(self.work.documents, composition.kept),
            objective={"name": "kl", "steps": inputs.config.steps, "init": "joined"},
            figures=figures["heldout"],
        )
