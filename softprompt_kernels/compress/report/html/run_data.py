"""What a run's folder holds, read for its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softprompt_kernels.compress.evaluate.details import Details, read_details
from softprompt_kernels.compress.evaluate.diagnosis import Diagnosis, read_diagnosis
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.report.metrics import Record, read_metrics
from softprompt_kernels.compress.report.table import SETS
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True, eq=False)
class RunData:
    """A finished run.

    Args:
        folder: of the run.
        config_text: the content of config.yaml.
        config: the same, parsed.
        figures: the content of evaluation.json.
        matching, training: the steps of both stages; empty without them.
        details: the evaluation token by token.
        diagnosis: None for a run that was not diagnosed.
    """

    folder: RunFolder
    config_text: str
    config: Mapping[str, Any]
    figures: Mapping[str, Any]
    matching: tuple[Record, ...]
    training: tuple[Record, ...]
    details: Details
    diagnosis: Diagnosis | None

    @property
    def context_name(self) -> str:
        """The name of the file that was compressed."""
        return Path(str(self.config.get("context", "the text"))).name


def _has_figures(figures: Any) -> bool:
    """Whether the figures are there without which nothing can be said of a run."""
    if not isinstance(figures, dict) or not isinstance(figures.get("heldout"), dict):
        return False
    sets = [figures[name] for name, _ in SETS if isinstance(figures.get(name), dict)]
    needed = [figures.get("context_tokens"), figures.get("prompt_tokens")]
    needed += [of_set.get(name) for of_set in sets for name in ("recovered", "top1_agreement", "kl_none", "kl_prompt")]
    return all(isinstance(value, (int, float)) for value in needed)


def read_run(path: Path) -> RunData:
    """Read a finished run.

    Raises:
        SoftPromptError: there is no finished run in this folder, it was finished by a version that kept no details, or
            a file of it cannot be read.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise SoftPromptError(f"run: {path} is not a folder; accepted is the --output of `softprompt compress`")
    if not folder.identity:
        raise SoftPromptError(f"run: {path} is not the folder of a run, because its run.json is missing or damaged")
    figures = folder.read_evaluation()
    if figures is None:
        raise SoftPromptError(
            f"run: {path} has no evaluation.json, so the run is not finished; run its `softprompt compress` again"
        )
    if not _has_figures(figures):
        raise SoftPromptError(f"run: {folder.evaluation} lacks figures of an evaluation")
    if "documents" in figures:
        raise SoftPromptError(
            f"run: {path} is a composition, which has no report; its `softprompt compose` prints its table"
        )
    if not folder.details.exists():
        raise SoftPromptError(
            f"run: {path} has no details.json, because an older version finished it. Delete {folder.evaluation} and "
            "run its `softprompt compress` again: it evaluates the prompt once more"
        )
    config_text = read_utf8(path / "config.yaml", str(path / "config.yaml"))
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise SoftPromptError(f"{path / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from error
    matching, training = read_metrics(folder.metrics) if folder.has_metrics else ([], [])
    return RunData(
        folder,
        config_text,
        config if isinstance(config, dict) else {},
        figures,
        tuple(matching),
        tuple(training),
        read_details(folder.details),
        read_diagnosis(folder.diagnosis) if folder.diagnosis.exists() else None,
    )
