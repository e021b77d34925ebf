"""The steps of a run, read from its metrics.jsonl, and the series that are drawn of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_kernels.errors import SoftPromptError

Record = Mapping[str, Any]


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps of matching and those of training, each in order.

    Matching has a record for each step of each group of layers. Of a step that was repeated after an interruption the
    last record counts. A last line that a crash cut off is ignored.

    Raises:
        SoftPromptError: the file does not exist, holds no steps, or has an invalid line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SoftPromptError(f"{file} cannot be read: {error}") from error
    steps: dict[tuple[str, int, int], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            steps[str(record["stage"]), int(record.get("first_layer", 0)), int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise SoftPromptError(f"{file}, line {number} is not the record of a step") from error
    if not steps:
        raise SoftPromptError(f"{file} has no steps yet")
    ordered = [steps[key] for key in sorted(steps)]
    return [r for r in ordered if r["stage"] == "matching"], [r for r in ordered if r["stage"] == "training"]


def matching_error(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """The steps of refinement, and the error of each: the mean over all layers."""
    layers: dict[int, int] = {}
    error: dict[int, float] = {}
    for record in records:
        layers[record["step"]] = layers.get(record["step"], 0) + record["layers"]
        error[record["step"]] = error.get(record["step"], 0.0) + record["layers"] * record["error"]
    steps = sorted(error)
    return steps, [error[step] / layers[step] for step in steps]


def heldout_points(training: Sequence[Record], figures: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Pairs of a step and the held-out KL after it, from step 0 to the last one.

    Args:
        training: the steps, at least one.
        figures: the content of evaluation.json, or a part of it.
    """
    heldout = figures.get("heldout") or {}
    points = {step["step"]: step["heldout_kl"] for step in training if step.get("heldout_kl") is not None}
    before, after = heldout.get(f"kl_{figures.get('start')}"), heldout.get("kl_prompt")
    if before is not None:
        points.setdefault(0, before)
    if after is not None:
        points[(figures.get("training") or {}).get("saved_step", training[-1]["step"])] = after
    return sorted(points.items())


def smooth(values: Sequence[float], span: int = 10) -> list[float]:
    """The mean of each value and the `span − 1` values before it, or as many as there are."""
    windows = (values[max(0, end - span) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
