"""Collects the evidence of a run from its folder, cheap things first.

The run's model, texts and queries are loaded as the run did, and must still be the same. The teacher's answers, targets
and hidden states are read from the cache of the run. Rows for matching are not kept by a run, so the teacher reads some
of the training answers again. What is made for the diagnosis lies in a folder of its own inside that of the run, and is
deleted at the end: the run itself is not changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.diagnose.capacity_curve import capacity_curve
from softprompt_kernels.compress.diagnose.evidence import AskedQuery, Evidence
from softprompt_kernels.compress.diagnose.rate_range_test import rate_test
from softprompt_kernels.compress.diagnose.turns import turns_of
from softprompt_kernels.compress.distill.trainer import Prompt
from softprompt_kernels.compress.evaluate.details import Details, ExampleDetails, read_details
from softprompt_kernels.compress.evaluate.distance import NEGLIGIBLE_KL, measure_tokens
from softprompt_kernels.compress.evaluate.example_details import GIVEN, example_details
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.initial_prompt import initial_prompt, matched_prompt
from softprompt_kernels.compress.inputs import Loaded, RunInputs, identity, load_inputs, sha256
from softprompt_kernels.compress.long_context.storage import plan_context
from softprompt_kernels.compress.matching.match import stored_match
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.self_study import self_study
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
from softprompt_kernels.compress.teaching import Taught, Teaching
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import check_fixed_frequencies, prefix_of
from softprompt_kernels.prompts import KVPrompt, Prefix, load

SCRATCH = ".diagnose"
"""In the folder of a run: what a diagnosis makes and deletes."""

MOST_ROWS = 3072
"""Rows for matching. A run may have more, but the curve needs to be right in its shape alone."""

SELF_STUDY = 256
"""Queries that self-study could make for a run that made none."""


def run_config(folder: RunFolder) -> CompressConfig:
    """The configuration of the run in a folder.

    Raises:
        SoftPromptError: the folder holds no run, or one in segments.
    """
    if not folder.path.is_dir():
        raise SoftPromptError(f"run: {folder.path} is no folder, accepted is the folder of a run of `compress`")
    if not folder.identity or not (folder.path / "config.yaml").is_file():
        raise SoftPromptError(
            f"run: {folder.path} holds no run: run.json or config.yaml is missing or broken; accepted is the folder "
            "that `compress` wrote"
        )
    if "runs" in folder.identity:
        raise SoftPromptError(
            f"run: {folder.path} is a composition, accepted is the folder of a run of `compress`; diagnose the runs "
            "that it was made of"
        )
    config = load_config(folder.path / "config.yaml", {"output": folder.path})
    if config.segment_tokens is not None:
        raise SoftPromptError(
            f"run: {folder.path} compressed a text in segments, accepted is a run without segment_tokens; the figures "
            "of each segment are in its evaluation.json"
        )
    return config


def load_run(folder: RunFolder, config: CompressConfig | None = None, loaded: Loaded | None = None) -> RunInputs:
    """The inputs of the run in a folder, which must be what they were.

    Args:
        folder: of the run.
        config: its configuration, with another device where one is wished; None: `run_config`.
        loaded: as in `load_inputs`.

    Raises:
        SoftPromptError: the folder holds no run, an input has gone, or is another one now.
    """
    config = config or run_config(folder)
    if folder.read_evaluation() is None and not folder.examples.exists():
        raise SoftPromptError(
            f"run: {folder.path} is not finished: the teacher has not answered the queries; run the command of the run "
            "again, and diagnose it then"
        )
    try:
        inputs = load_inputs(config, loaded)
    except SoftPromptError as error:
        raise SoftPromptError(
            f"{error}. It is named in {folder.path / 'config.yaml'}: correct it there if it has moved. Relative paths "
            "start at the current folder"
        ) from error
    recorded = folder.current
    now = identity(inputs, recorded)
    changed = sorted(name for name in {*now, *recorded} if now.get(name) != recorded.get(name))
    if changed:
        raise SoftPromptError(
            f"run: {folder.path} was made with another {', another '.join(changed)} than config.yaml names now; "
            "accepted are the same files as in the run"
        )
    return inputs


@contextmanager
def scratch_folder(folder: RunFolder) -> Iterator[RunFolder]:
    """A folder that looks like that of the run to the teacher, and is deleted at the end.

    The files of the cache are links. Whoever writes one of them writes a new file in their place.
    """
    scratch = RunFolder(folder.path / SCRATCH)
    shutil.rmtree(scratch.path, ignore_errors=True)  # of a process that was killed
    try:
        scratch.cache.mkdir(parents=True)
        shutil.copy(folder.path / "run.json", scratch.path)
        for name in ("", "targets", "states"):
            (scratch.cache / name).mkdir(exist_ok=True)
            for path in (folder.cache / name).glob("*"):
                if path.is_file() and not path.name.startswith(("rows", "matched")):
                    link(path, scratch.cache / name / path.name)
        yield scratch
    finally:
        shutil.rmtree(scratch.path, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Collector:
    """Collects evidence of one run.

    Args:
        inputs: of the run.
        folder: of the run.
        scratch: from `scratch_folder`.
        reporter: receives the progress.
    """

    inputs: RunInputs
    folder: RunFolder
    scratch: RunFolder
    reporter: Reporter

    @cached_property
    def context(self) -> Prefix:
        """The captured context."""
        plan = plan_context(self.inputs, self.folder, self.folder.context, self.reporter)
        return capture_context(self.inputs.model, self.inputs.context_ids, storage=plan.storage)

    @cached_property
    def taught(self) -> Taught:
        """The teacher's answers and hidden states."""
        return self._teach(steps=0, rows=0)

    def _teach(self, *, steps: int, rows: int) -> Taught:
        """What the teacher leaves for a training of so many steps and a matching of so many rows."""
        config = self.inputs.config.model_copy(
            update={"steps": steps, "init": "matched" if rows else "first", "matching_rows": rows}
        )
        return Teaching(replace(self.inputs, config=config), self.scratch, self.context, self.reporter).teach()

    def cheap(self) -> Evidence:
        """What is known without matching and training.

        Raises:
            SoftPromptError: the run is not finished, and was not refused either.
        """
        config, finished = self.inputs.config, self.folder.read_evaluation() is not None
        details = self._details(finished)
        refused = not finished and any(mean_none(of_set) <= NEGLIGIBLE_KL for of_set in details.sets.values())
        if not finished and not refused:
            raise SoftPromptError(
                f"run: {self.folder.path} is not finished; run the command of the run again, and diagnose it then"
            )
        heldout = details.sets["heldout"]
        initial = None
        if all("initial" in one.kl for one in heldout):
            initial = tuple(sum(one.kl["initial"]) for one in heldout)
        made = len(self_study(self.inputs.text, config.selfstudy, config.seed))
        possible = len(self_study(self.inputs.text, 2 * config.selfstudy or SELF_STUDY, config.seed))
        steps = self._training_steps() if finished else []
        error = details.match_error
        return Evidence(
            config=config,
            context_tokens=self.inputs.context_tokens,
            heldout=tuple(asked(one) for one in heldout),
            train=tuple(asked(one) for one in details.sets["train"]),
            turns=turns_of(self.inputs, self.taught),
            refused=refused,
            entropy_gap=self._entropy_gap(),
            initial=initial,
            losses=tuple(loss for loss, _ in steps),
            learning_rates=tuple(rate for _, rate in steps),
            match_error=None if error is None else tuple(sum(layer) / len(layer) for layer in error),
            train_families=Counter(query.family or GIVEN for query in self.inputs.train),
            more_selfstudy=possible - made,
        )

    def with_matching_and_rates(self, evidence: Evidence) -> Evidence:
        """The same with the capacity curve and, if the run was trained, a rate range test."""
        config = self.inputs.config
        try:
            check_fixed_frequencies(self.inputs.model)
        except SoftPromptError as error:
            self.reporter.message(f"No prompt is matched: {error}")
            return evidence
        taught = self._teach(steps=config.steps, rows=min(config.matching_rows, MOST_ROWS))
        assert taught.rows is not None
        matched, prompts = capacity_curve(self.inputs, self.context, taught, taught.rows, self.reporter)
        evidence = replace(evidence, matched=tuple(matched))
        if not config.steps:
            return evidence
        start = self._start(prompts)
        return replace(evidence, rate_test=rate_test(self.inputs, start, taught, self.reporter))

    def _start(self, prompts: dict[int, KVPrompt]) -> Prompt:
        """The prompt that the training of the run started from; the closed form if a matched one is not stored."""
        config = self.inputs.config
        if config.init != "matched":
            return initial_prompt(self.inputs, self.context)
        key = sha256(json.dumps(self.folder.identity, sort_keys=True))
        stored = stored_match(self.context, self.folder.cache, key)
        return prompts[config.tokens] if stored is None else matched_prompt(self.inputs, self.context, stored)

    def _details(self, finished: bool) -> Details:
        """The details of the run; those of no context, and of the prompt if there is one, where none are stored."""
        if finished and self.folder.details.exists():
            return read_details(self.folder.details)
        inputs, taught = self.inputs, self.taught
        students: dict[str, Prefix | None] = {"none": no_context_prefix(inputs.model, inputs.chat)}
        if finished:
            prompt, _ = load(self.folder.prompt, inputs.model, inputs.tokenizer)
            students["prompt"] = prefix_of(inputs.model, prompt).detach()
        ends, sets = end_tokens(inputs.model, inputs.chat), {}
        for name, examples in taught.evaluated.items():
            if finished and name == "test":
                continue  # it chooses nothing
            measured = measure_tokens(
                inputs.model, self.context, students, examples, self.reporter, name, teacher=taught.states[name]
            )
            sets[name] = example_details(inputs.tokenizer, taught.queries[name], examples, measured, ends)
        return Details(sets=sets)

    def _training_steps(self) -> list[tuple[float, float]]:
        """Loss and learning rate of each step of training; none if the file is damaged."""
        if not self.inputs.config.steps or not self.folder.has_metrics:
            return []
        try:
            records = [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]
            training = [one for one in records if one["stage"] == "training"]
            return [(float(one["loss"]), float(one["learning_rate"])) for one in training]
        except (ValueError, KeyError, TypeError):
            self.reporter.message(f"Warning: {self.folder.metrics} is damaged, and says nothing of the training.")
            return []

    def _entropy_gap(self) -> float:
        return float(((self.folder.read_evaluation() or {}).get("heldout") or {}).get("entropy_gap", 0.0))


def asked(one: ExampleDetails) -> AskedQuery:
    """The sums of one evaluated query."""
    prompt, agrees = one.kl.get("prompt", ()), one.agrees.get("prompt", ())
    return AskedQuery(
        query=one.query,
        answer=one.answer,
        family=one.family,
        tokens=len(one.tokens),
        none=sum(one.kl["none"]),
        prompt=sum(prompt),
        agreeing=sum(agrees),
        agreeing_prompt=sum(kl for kl, same in zip(prompt, agrees, strict=True) if same),
    )


def mean_none(examples: tuple[ExampleDetails, ...]) -> float:
    """KL without context of a set, nats per token."""
    tokens = sum(len(one.tokens) for one in examples)
    return sum(sum(one.kl["none"]) for one in examples) / max(1, tokens)


def link(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy of it where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
