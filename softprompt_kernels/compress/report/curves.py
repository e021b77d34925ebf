"""The curves of a training as a picture.

It only needs what a run has written (metrics.jsonl, evaluation.json), so it can be made again at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_curves(metrics: Path, figures: Mapping[str, Any], target: Path) -> None:
    """Draws the course of a training as a PNG: loss and held-out KL over the baselines, learning rate, gradient.

    Args:
        metrics: the run's metrics.jsonl.
        figures: the content of evaluation.json, or as much of it as there is; {} without.
        target: the picture, replaced as a whole.

    Raises:
        SoftPromptError: there are no metrics, or they cannot be read.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    steps = read_metrics(metrics)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _draw_loss(axes[0], steps, figures.get("heldout") or {}, figures.get("start"))
    _draw_figure(axes[1], steps, "learning_rate", "learning rate")
    _draw_figure(axes[2], steps, "grad_norm", "gradient norm [nats]")
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

    A step that was done again after an interrupt counts once, as it was done last; a last line that a crash cut off is
    left out.

    Raises:
        SoftPromptError: no such file, no steps in it, or a line that is none.
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
                raise SoftPromptError(f"{file}, line {number} is no step of a training") from error
    if not steps:
        raise SoftPromptError(f"{file} has no steps yet")
    return [steps[step] for step in sorted(steps)]


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], heldout: Mapping[str, Any], start_row: str | None) -> None:
    """Training loss, smoothed over it, held-out KL from where it started, baselines as lines to cross."""
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
    baselines = (
        ("none", ":", "nothing"),
        ("truncated", "-.", "truncated context"),
        ("untrained", "--", "untrained strided KV"),
    )
    for key, style, name in baselines:
        value = heldout.get(f"kl_{key}")
        if value is not None:
            label = f"held-out KL of {name}: {value:.3g}"
            axes.axhline(value, color="tab:gray", linestyle=style, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("nats per token")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="best")


def _draw_figure(axes: Axes, steps: list[dict[str, Any]], key: str, label: str) -> None:
    points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1)
    axes.set_ylabel(label)
    axes.grid(which="major", alpha=0.2)


def _smooth(values: Sequence[float], span: int = 10) -> list[float]:
    """Mean of each value and up to `span − 1` before it."""
    windows = (values[max(0, end - span) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _title(figures: Mapping[str, Any]) -> str:
    context, prompt = figures.get("context_tokens"), figures.get("prompt_tokens")
    if not context or not prompt:
        return "training of a soft prompt"
    return f"{context} tokens in a soft prompt of {prompt} ({context / prompt:.1f}×)"
