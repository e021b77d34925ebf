"""The training curves of a run as a PNG.

It needs only the files of a run (metrics.jsonl, evaluation.json), so it can be drawn again at any time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.compress.report.metrics import heldout_points, matching_error, read_metrics, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


def save_curves(metrics: Path, figures: Mapping[str, Any], target: Path) -> None:
    """Draw the curves of a run: the error of matching, then loss and held-out KL with the baselines, learning rate and
    gradient norm of the training. A stage that the run does not have is left out.

    Args:
        metrics: the run's metrics.jsonl.
        figures: the content of evaluation.json, or a part of it; {} if there is none.
        target: the PNG, replaced atomically.

    Raises:
        SoftPromptError: there are no metrics, or they cannot be read.
    """
    figure_type, canvas_type = figure_and_canvas()
    matching, training = read_metrics(metrics)
    heights = [2] * bool(matching) + [3, 1, 1] * bool(training)
    figure = figure_type(figsize=(8, 1 + 1.4 * sum(heights)), layout="constrained")
    canvas_type(figure)
    axes = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    axes[0].set_title(_title(figures))
    if matching:
        _draw_matching(axes.pop(0), matching)
    if training:
        _draw_loss(axes[0], training, figures)
        _draw_metric(axes[1], training, "learning_rate", "learning rate")
        _draw_metric(axes[2], training, "grad_norm", "gradient norm [nats]")
        if any(step.get("grad_norm") for step in training):
            axes[2].set_yscale("log")
        axes[2].set_xlabel("step of training")
        for axis in axes[:2]:
            axis.sharex(axes[2])
            axis.tick_params(labelbottom=False)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def figure_and_canvas() -> tuple[type[Figure], type[FigureCanvasAgg]]:
    """matplotlib's figure, and the canvas that draws it in memory. Not pyplot, which chooses a backend for a display.

    matplotlib cannot be imported where MPLBACKEND names a backend that is not there, such as a notebook's in the shell
    of that notebook. So it is imported without the variable, and gets the backend afterwards, as its import does it.
    """
    wanted = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with suppress(ValueError):  # no backend of that name: not ours to report, nothing here uses it
            matplotlib.rcParams["backend"] = wanted
    return Figure, FigureCanvasAgg


def _draw_matching(axes: Axes, records: list[dict[str, Any]]) -> None:
    """The error of refinement, mean over all layers, and its moving average."""
    steps, mean = matching_error(records)
    axes.plot(steps, mean, color="tab:green", alpha=0.3, linewidth=1)
    axes.plot(steps, smooth(mean), color="tab:green", label="error of the attention output (mean of the last 10 steps)")
    axes.set_yscale("log")
    axes.set_xlabel("step of matching")
    axes.set_ylabel("relative squared error")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small", loc="best")


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], figures: Mapping[str, Any]) -> None:
    """Training loss, its moving average, held-out KL from step 0 on, and each baseline as a horizontal line."""
    x = [step["step"] for step in steps]
    loss = [step["loss"] for step in steps]
    axes.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(x, smooth(loss), color="tab:blue", label="training loss (mean of the last 10 steps)")
    points, heldout = heldout_points(steps, figures), figures.get("heldout") or {}
    if points:
        axes.plot(*zip(*points, strict=True), "o--", color="tab:orange", label="held-out KL")
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


def _title(figures: Mapping[str, Any]) -> str:
    context, prompt = figures.get("context_tokens"), figures.get("prompt_tokens")
    if not context or not prompt:
        return "the soft prompt"
    return f"{context} tokens in a soft prompt of {prompt} ({context / prompt:.1f}×)"
