"""The plot of the study: recovered on held-out questions, against the ratio (above) and the seconds at 8× (below)."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.study.methods import METHODS
from benchmarks.study.results import Record, Results
from benchmarks.study.table import PLOT, TIMED_RATIO, grouped, seed_mean, spread, total_seconds

MARKERS = "osD^vP*X<>h"
COLOURS = (*(f"C{index}" for index in range(10)), "black")
SECONDS = (1, 3, 10, 30, 100, 300, 1000, 3000)


def save_plot(results: Results, path: Path = PLOT) -> bool:
    """Write the plot.

    Returns:
        False if nothing has been measured; then nothing is written.
    """
    texts = grouped(results)
    if not texts:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same results give the same file
    figure, axes = pyplot.subplots(
        2, len(texts), figsize=(4.2 * len(texts) + 1.6, 7.2), squeeze=False, sharey="col", layout="constrained"
    )
    for column, (text, methods) in enumerate(texts.items()):
        _against_ratio(axes[0, column], methods)
        _against_seconds(axes[1, column], methods)
        axes[0, column].set_title(text)
    axes[0, 0].set_ylabel("recovered")
    axes[1, 0].set_ylabel("recovered")
    # One entry for a method, also where another text lacks it.
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(entries, key=_order)
    figure.legend([entries[label] for label in order], order, loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _against_ratio(axis: Axes, methods: dict[str, dict[int, list[Record]]]) -> None:
    for method, by_ratio in methods.items():
        ratios = sorted(by_ratio)
        means = [seed_mean(by_ratio[ratio], "heldout") or 0.0 for ratio in ratios]
        errors = [spread(by_ratio[ratio]) or 0.0 for ratio in ratios]
        axis.errorbar(ratios, means, errors, label=_label(method), capsize=2, **_style(method))
    ratios = sorted({ratio for by_ratio in methods.values() for ratio in by_ratio})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ratios, [f"{ratio}×" for ratio in ratios])
    axis.set_xlabel("ratio")
    _common(axis)


def _against_seconds(axis: Axes, methods: dict[str, dict[int, list[Record]]]) -> None:
    for method, by_ratio in methods.items():
        if cells := by_ratio.get(TIMED_RATIO):
            mean = seed_mean(cells, "heldout")
            axis.errorbar([total_seconds(cells)], [mean or 0.0], [spread(cells) or 0.0], capsize=2, **_style(method))
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.9), max(high, 300))
    shown = [tick for tick in SECONDS if tick <= axis.get_xlim()[1]]
    axis.set_xticks(shown, [str(tick) for tick in shown])
    axis.minorticks_off()
    axis.set_xlabel(f"seconds at {TIMED_RATIO}×")
    _common(axis)


def _common(axis: Axes) -> None:
    axis.set_ylim(min(0.0, max(axis.get_ylim()[0], -0.5)), 1.0)
    axis.grid(alpha=0.3)


def _label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def _order(label: str) -> int:
    labels = [method.label for method in METHODS.values()]
    return labels.index(label) if label in labels else len(labels)


def _style(method: str) -> dict[str, object]:
    """Colour and marker of a method; what does not read the teacher's answers is dashed."""
    index = list(METHODS).index(method) if method in METHODS else len(METHODS)
    dashed = method in METHODS and not METHODS[method].reads_answers
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.2,
        "linestyle": "--" if dashed else "-",
    }
