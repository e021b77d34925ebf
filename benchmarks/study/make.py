"""Makes the prompt of a cell: of tokens of the text, with a press, or by a run of `compress`.

A run is given the shared answers: they are put into its folder, where it would keep its own. It is resumed from its
folder after an interruption, as every run is.

Seconds are by stage. "context" is the capture of the text, "answers" the sampling of the training answers, with the
targets and rows that are recorded in the same pass, also for a method that uses only a part of them. Both are measured
once and are equal for all methods that need them. The evaluation is in no method's seconds.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.cells import Cell, digest, settings
from benchmarks.study.press import press_prefix
from benchmarks.study.teacher import Study, Teacher
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import identity, load_inputs
from softprompt_kernels.compress.run import compress_one
from softprompt_kernels.compress.sources.chat import INSTRUCTION
from softprompt_kernels.compress.teacher.context import capture_context, select_tokens
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import Prefix, load

STAGES = ("matching", "training")
"""The stages of a run that belong to its method. The others are shared, or evaluate."""


@dataclass(frozen=True, eq=False)
class Made:
    """A prompt and how it was made.

    Args:
        prefix: k tokens.
        seconds: by stage.
        settings: of the method, with its defaults.
        folder: of the run; it may be deleted once the result is stored. None if there is none.
    """

    prefix: Prefix
    seconds: dict[str, float]
    settings: dict[str, Any]
    folder: Path | None = None


def make_prompt(study: Study, cell: Cell, k: int) -> Made:
    """The prompt of k tokens of a cell.

    Raises:
        SoftPromptError: the method cannot run here or with these settings.
    """
    return {"tokens": _of_tokens, "press": _of_press, "run": _of_run}[cell.method.kind](study, cell, k)


def _of_tokens(study: Study, cell: Cell, k: int) -> Made:
    how = cell.method.settings(cell.text)["how"]
    context = study.captured(cell.text)
    begin = time.perf_counter()
    if how == "first":  # needs no pass over the rest of the text
        prefix = capture_context(study.model, context.ids[:, :k])
        return Made(prefix, {"context": time.perf_counter() - begin}, {"how": how})
    prefix = select_tokens(study.model, context.prefix, k, how)
    return Made(prefix, {"context": context.seconds, "selection": time.perf_counter() - begin}, {"how": how})


def _of_press(study: Study, cell: Cell, k: int) -> Made:
    chosen = cell.method.settings(cell.text)
    before = len(study.chat.tokenizer(study.chat.context_start + INSTRUCTION, add_special_tokens=False)["input_ids"])
    prefix, seconds = press_prefix(
        study.model, study.name, study.captured(cell.text).ids, before, k, chosen, study.work / cell.text.name / "press"
    )
    return Made(prefix, {"context and press": seconds}, chosen)


def _of_run(study: Study, cell: Cell, k: int) -> Made:
    teacher = study.teacher(cell.text, cell.seed)
    key = digest(settings(cell, study.name))
    output = teacher.folder / f"{cell.method.name}-{cell.ratio}x-{key}"
    config = teacher.run_config(output, {"tokens": k, **cell.method.settings(cell.text)})
    prepare_run(config, teacher)
    figures = compress_one(config, study.reporter)
    model, tokenizer = study.loaded
    prompt, _ = load(RunFolder(config.output).prompt, model, tokenizer)
    seconds = {
        "context": study.captured(cell.text).seconds,
        "answers": teacher.taught[1],
        **method_seconds(figures),
    }
    fields = config.model_dump(mode="json", exclude={"model", "context", "output", "queries", "heldout", "threads"})
    return Made(prefix_of(model, prompt).detach(), seconds, fields, config.output)


def prepare_run(config: CompressConfig, teacher: Teacher) -> None:
    """Link what the teacher left into the folder of a run, so that the run does not ask it again."""
    folder, (taught, _) = RunFolder(config.output), teacher.taught
    if folder.examples.exists():
        return
    folder.claim(identity(load_inputs(config), folder.identity), config.to_yaml())
    part = folder.path / "cache.part"  # renamed when all of it is there
    for path in (part, folder.cache):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(taught.cache, part, copy_function=os.link)
    part.rename(folder.cache)


def method_seconds(figures: dict[str, Any]) -> dict[str, float]:
    """The stages of a run that belong to the method, and their seconds, from the content of evaluation.json."""
    return {name: float(seconds) for name, seconds in figures["stages"].items() if name in STAGES}


def clean(made: Made) -> None:
    """Delete what a finished run left."""
    if made.folder is not None:
        shutil.rmtree(made.folder, ignore_errors=True)
