"""The training curves of a run as a PNG.

It needs only the files of a run (metrics.jsonl, evaluation.json), so it can be drawn again at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_curves(metrics: Path, figures: Mapping[str, Any], target: Path) -> None:
    """Draw the training curves: loss and held-out KL with the baselines, learning rate, gradient norm.

    Args:
        metrics: the run's metrics.jsonl.
        figures: the content of evaluation.json, or a part of it; {} if there is none.
        target: the PNG, replaced atomically.

    Raises:
        SoftPromptError: there are no metrics, or they cannot be read.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    steps = read_metrics(metrics)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _draw_loss(axes[0], steps, figures.get("heldout") or {}, figures.get("start"))
    _draw_metric(axes[1], steps, "learning_rate", "learning rate")
    _draw_metric(axes[2], steps, "grad_norm", "gradient norm [nats]")
    if any(step.get("grad_norm") for step in steps):
        axes[2].set_yscale("log")
    axes[2].set_xlabel("step")
    axes[0].set_title(_title(figures))
    temporary = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The steps of a run, in order.

    Of a step that was repeated after an interruption the last record counts. A last line that a crash cut off is
    ignored.

    Raises:
        SoftPromptError: the file does not exist, holds no steps, or has an invalid line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SoftPromptError(f"{file} cannot be read: {error}") from error
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise SoftPromptError(f"{file}, line {number} is not the record of a training step") from error
    if not steps:
        raise SoftPromptError(f"{file} has no steps yet")
    return [steps[step] for step in sorted(steps)]


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], heldout: Mapping[str, Any], start_row: str | None) -> None:
    """Training loss, its moving average, held-out KL from step 0 on, and each baseline as a horizontal line."""
    x = [step["step"] for step in steps]
    loss = [step["loss"] for step in steps]
    axes.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(x, _smooth(loss), color="tab:blue", label="training loss (mean of the last 10 steps)")
    points = {step["step"]: step["heldout_kl"] for step in steps if step.get("heldout_kl") is not None}
    start = heldout.get(f"kl_{start_row}")
    if start is not None:
        points.setdefault(0, start)
    if heldout.get("kl_prompt") is not None:
        points[x[-1]] = heldout["kl_prompt"]
    if points:
        axes.plot(*zip(*sorted(points.items()), strict=True), "o--", color="tab:orange", label="held-out KL")
    for key, style in (("none", ":"), ("truncated", "-."), ("untrained", "--")):
        value = heldout.get(f"kl_{key}")
        if value is not None:
            label = f"held-out KL, {STUDENT_NAMES[key]}: {value:.3g}"
            axes.axhline(value, color="tab:gray", linestyle=style, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("nats per token")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="best")


def _draw_metric(axes: Axes, steps: list[dict[str, Any]], key: str, label: str) -> None:
    points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1)
    axes.set_ylabel(label)
    axes.grid(which="major", alpha=0.2)


def _smooth(values: Sequence[float], span: int = 10) -> list[float]:
    """The mean of each value and the `span − 1` values before it, or as many as there are."""
    windows = (values[max(0, end - span) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _title(figures: Mapping[str, Any]) -> str:
    context, prompt = figures.get("context_tokens"), figures.get("prompt_tokens")
    if not context or not prompt:
        return "training of the soft prompt"
    return f"{context} tokens in a soft prompt of {prompt} ({context / prompt:.1f}×)"
