"""What all methods share for one text and seed: the captured context, the teacher's answers, and the evaluation.

The answers are made once and kept below `runs/study`, so methods differ in nothing else. A method that reads them has
their seconds in its own.

    figures of a set    KL from the full context of the prompt, and of no context, nats per token, full vocabulary;
                        recovered = 1 − KL / KL without context; top-1 agreement; entropy gap

Cost: one pass over the context, one sampled answer for each query, and one pass of teacher, of no context and of each
prompt over the held-out and test answers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.study.cells import ANSWERS, digest, teacher_settings
from benchmarks.study.corpus import Text
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.evaluate.distance import Distance, check_context_matters, distance
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import check_window, load_inputs, read_queries, read_text
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.sources.queries import Query, load_queries, save_queries, write_text
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer, hidden_states
from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
from softprompt_kernels.compress.teaching import Teaching
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import Prefix

SETS = ("train", "heldout", "test")  # a set is answered with the seed plus its place here
WATCHED = 4
"""Held-out examples that a run of `compress` is given. It must have some; the study evaluates with all of them."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A text, read once.

    Args:
        ids: `[1, C]`.
        prefix: the captured context.
        seconds: that the capture took.
    """

    ids: Tensor
    prefix: Prefix
    seconds: float


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to one set of queries, and the seconds that they took."""

    examples: list[Example]
    seconds: float


class Study:
    """The model, and what has been captured and answered so far. The model is loaded when it is first needed.

    Args:
        name: folder of the model.
        work: folder for answers and unfinished runs.
        reporter: receives the progress.
    """

    def __init__(self, name: str, work: Path, reporter: Reporter) -> None:
        self.name, self.work, self.reporter = name, work, reporter
        self._captured: dict[str, Captured] = {}
        self._teachers: dict[tuple[str, int], Teacher] = {}

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, prepared, and its tokenizer."""
        return load_model(self.name, "float32")

    @property
    def model(self) -> PreTrainedModel:
        """The model, prepared."""
        return self.loaded[0]

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format of the model."""
        return ChatFormat(self.loaded[1])

    def captured(self, text: Text) -> Captured:
        """The context of a text."""
        if text.name not in self._captured:
            ids = self.chat.context_ids(read_text(text.context, "context")).to(self.model.device)
            begin = time.perf_counter()
            prefix = capture_context(self.model, ids)
            self._captured[text.name] = Captured(ids, prefix, time.perf_counter() - begin)
        return self._captured[text.name]

    def teacher(self, text: Text, seed: int) -> Teacher:
        """The teacher of a text, with its answers."""
        if (text.name, seed) not in self._teachers:
            self._teachers[text.name, seed] = Teacher(self, text, seed)
        return self._teachers[text.name, seed]


class Teacher:
    """The teacher's answers to a text's questions, for one seed. Each set is answered when it is first needed.

    Args:
        study: model and captured contexts.
        text: the text.
        seed: of self-study and sampling.

    Attributes:
        folder: below which everything of this teacher is kept.
    """

    def __init__(self, study: Study, text: Text, seed: int) -> None:
        self.study, self.text, self.seed = study, text, seed
        key = digest(teacher_settings(text, seed, study.name))
        self.folder = study.work / text.name / f"s{seed}-{key}"
        self._answers: dict[str, Answers] = {}

    @cached_property
    def taught(self) -> tuple[RunFolder, float]:
        """A folder with the teacher's part of a run (see `compress.teaching`), and the seconds that it took."""
        folder = RunFolder(self.folder / "taught")
        record = folder.path / "seconds.json"
        if not record.is_file():
            shutil.rmtree(folder.path, ignore_errors=True)
            prefix = self.study.captured(self.text).prefix
            inputs = load_inputs(self.run_config(folder.path, {"tokens": 1, "init": "matched", "steps": 1}))
            folder.path.mkdir(exist_ok=True)
            begin = time.perf_counter()
            Teaching(inputs, folder, prefix, self.study.reporter).teach()
            write_text(record, json.dumps(time.perf_counter() - begin))
        return folder, float(json.loads(record.read_text(encoding="utf-8")))

    def run_config(self, output: Path, settings: dict[str, Any]) -> CompressConfig:
        """The configuration of a run of `compress` with these settings. The study's queries are files of its own."""
        train, watched = self.folder / "train.jsonl", self.folder / "watched.jsonl"
        if not (train.is_file() and watched.is_file()):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_queries(train, {"train": self._training_queries()})  # one line for each answer
            save_queries(watched, {"heldout": load_queries(self.text.heldout)[:WATCHED]})
        return load_config(
            None,
            {
                "model": self.study.name,
                "context": self.text.context,
                "output": output,
                "queries": train,
                "heldout": watched,
                "selfstudy": 0,
                "evaluation_sequences": WATCHED,
                "seed": self.seed,
                "dtype": "float32",
                **ANSWERS,
                **settings,
            },
        )

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The sets that are evaluated: "heldout", and "test" where the text has one."""
        return ("heldout", "test") if self.text.test.is_file() else ("heldout",)

    def answers(self, name: str) -> Answers:
        """The answers to "heldout" or "test".

        Raises:
            SoftPromptError: a file of questions is invalid, or one is too long for the model.
        """
        if name not in self._answers:
            self._answers[name] = _read(self.folder / f"{name}.json") or self._ask(name)
        return self._answers[name]

    def _ask(self, name: str) -> Answers:
        study = self.study
        context = study.captured(self.text)
        queries = load_queries(self.text.heldout if name == "heldout" else self.text.test)
        check_window(study.model, study.chat, context.ids.shape[1], queries, ANSWERS["new_tokens"])
        begin = time.perf_counter()
        examples = answer(
            study.model,
            study.chat,
            context.prefix,
            queries,
            new_tokens=ANSWERS["new_tokens"],
            temperature=ANSWERS["sample_temperature"],
            batch_size=ANSWERS["sample_batch"],
            seed=self.seed + SETS.index(name),
            reporter=study.reporter,
        )
        seconds = time.perf_counter() - begin
        self.folder.mkdir(parents=True, exist_ok=True)
        ids = [(example.input_ids, example.output_ids) for example in examples]
        write_text(self.folder / f"{name}.json", json.dumps({"seconds": seconds, "examples": ids}))
        return Answers(examples, seconds)

    def _training_queries(self) -> list[Query]:
        """Without those that are held out or in the test set, and repeated for each sample."""
        text = self.text
        config = load_config(
            None,
            {
                "model": self.study.name,
                "context": text.context,
                "output": self.folder,
                "tokens": 1,
                "queries": text.queries,
                "heldout": text.heldout,
                "test": text.test if text.test.is_file() else None,
                "selfstudy": text.selfstudy,
                "samples": text.samples,
                "seed": self.seed,
            },
        )
        return list(read_queries(config, read_text(text.context, "context"))[0])

    @cached_property
    def _references(self) -> dict[str, tuple[list[Tensor], Distance]]:
        """For each evaluated set the teacher's hidden states, and the distance of the model without context."""
        study, prefix = self.study, self.study.captured(self.text).prefix
        none = no_context_prefix(study.model, study.chat)
        references = {}
        for name in self.evaluated:
            examples = self.answers(name).examples
            teacher = self._hidden(prefix, examples, f"Full context, {name} queries")
            without = distance(
                head_of(study.model), self._hidden(none, examples, f"No context, {name} queries"), teacher
            )
            check_context_matters(without.kl)
            references[name] = (teacher, without)
        return references

    def _hidden(self, prefix: Prefix | None, examples: Sequence[Example], stage: str) -> list[Tensor]:
        return hidden_states(self.study.model, prefix, examples, self.study.reporter, stage)

    def evaluate(self, prompt: Prefix) -> dict[str, dict[str, Any]]:
        """The figures of a prompt on each evaluated set."""
        figures = {}
        for name, (teacher, none) in self._references.items():
            hidden = self._hidden(prompt, self.answers(name).examples, f"Prompt, {name} queries")
            found = distance(head_of(self.study.model), hidden, teacher)
            figures[name] = {
                "recovered": 1 - found.kl / none.kl,
                "kl": found.kl,
                "kl_none": none.kl,
                "top1_agreement": found.top1_agreement,
                "top1_agreement_none": none.top1_agreement,
                "entropy_gap": found.entropy_gap,
                "tokens": found.tokens,
            }
        return figures


def prompt_tokens(context_tokens: int, ratio: int) -> int:
    """k of a ratio: the largest with C / k ≥ ratio.

    Raises:
        SoftPromptError: the text is too short.
    """
    if context_tokens < ratio:
        raise SoftPromptError(f"ratio: got {ratio} for a text of {context_tokens} tokens, accepted is at most that")
    return context_tokens // ratio


def _read(file: Path) -> Answers | None:
    """Stored answers; None if they are not made yet, or were cut off by a crash."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        examples = [Example(tuple(x), tuple(y)) for x, y in saved["examples"]]
        return Answers(examples, float(saved["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
