"""Charts of where the soft prompt is far from the full context: positions, kinds of queries, layers and heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean

from softprompt_kernels.compress.evaluate.details import ExampleDetails
from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.compress.report.html.chart import PATTERNS, Chart, add_line, log_axis, new_figure, number
from softprompt_kernels.compress.report.html.run_data import RunData
from softprompt_kernels.compress.report.table import SETS

MOST_POINTS = 64
MOST_LETTERS = 14  # of the name of a family below its bars
SMALLEST_ERROR = 1e-6  # what is below is drawn as if it were that


def distance_charts(run: RunData) -> list[Chart]:
    """The charts of the details that the run has."""
    charts = [position_chart(run), family_chart(run), heads_chart(run)]
    return [chart for chart in charts if chart is not None]


def position_chart(run: RunData) -> Chart | None:
    """Mean KL at each position of the held-out answers, in runs of positions where answers are long."""
    examples = run.details.sets.get("heldout") or ()
    longest = max((len(example.tokens) for example in examples), default=0)
    if not longest:
        return None
    width = math.ceil(longest / MOST_POINTS)
    starts = range(0, longest, width)
    counts = [sum(len(e.tokens[start : start + width]) for e in examples) for start in starts]
    labels = [str(start + 1) if width == 1 else f"{start + 1}–{start + width}" for start in starts]
    figure = new_figure("position in the answer [tokens]", "KL [nats per token]", yaxis={"rangemode": "tozero"})
    means: dict[str, list[float]] = {}
    for student in students_of(examples):
        means[student] = [
            fmean(kl for example in examples for kl in example.kl[student][start : start + width]) for start in starts
        ]
        add_line(
            figure,
            [start + (width + 1) / 2 for start in starts],
            means[student],
            STUDENT_NAMES.get(student, student),
            student,
            customdata=list(zip(labels, counts, strict=True)),
            hovertemplate="position %{customdata[0]}: %{y:.3f} nats, %{customdata[1]} tokens",
            mode="lines+markers" if len(starts) == 1 else "lines",
        )
    half = max(1, len(starts) // 2)
    first, second = (
        _weighted(means["prompt"], counts, part)
        for part in (slice(None, half), slice(half, None) if half < len(starts) else slice(None))
    )
    lengths = [len(example.tokens) for example in examples]
    reach = "All answers reach" if min(lengths) == longest else f"{lengths.count(longest)} of {len(lengths)} reach"
    summary = (
        f"Held-out answers. With the soft prompt, the KL is {number(first)} in the first half of the positions and "
        f"{number(second)} in the second. {reach} the last position."
    )
    return Chart("position", "KL by position in the answer", summary, figure)


def family_chart(run: RunData) -> Chart | None:
    """Mean KL of each kind of query, in each set."""
    groups = [
        ((title, family), [example for example in run.details.sets[name] if example.family == family])
        for name, title in SETS
        if name in run.details.sets
        for family in dict.fromkeys(example.family for example in run.details.sets[name])
    ]
    if not groups:
        return None
    everything = [example for _, examples in groups for example in examples]
    labels = [_label(title, family) for (title, family), _ in groups]
    figure = new_figure("", "KL [nats per token]", barmode="group")
    shortened = [_label(title, _shortened(family)) for (title, family), _ in groups]
    figure.update_xaxes(tickvals=list(range(len(groups))), ticktext=shortened)
    for student in students_of(everything):
        values = [_mean(examples, student) for _, examples in groups]
        figure.add_bar(
            x=labels,
            y=values,
            name=STUDENT_NAMES.get(student, student),
            meta={"role": student},
            marker={"pattern": {"shape": PATTERNS.get(student, ""), "size": 7, "solidity": 0.3, "fillmode": "overlay"}},
            customdata=[len(examples) for _, examples in groups],
            hovertemplate="%{x}: %{y:.3f} nats, %{customdata} queries",
        )
    parts = []
    for (title, family), examples in groups:
        none, prompt = _mean(examples, "none"), _mean(examples, "prompt")
        if none and prompt is not None:
            count = "1 query" if len(examples) == 1 else f"{len(examples)} queries"
            parts.append(f"{title} {family}: {number(1 - prompt / none)} ({count})")
    return Chart("family", "KL by kind of query", f"Recovered: {', '.join(parts)}.", figure, 380)


def heads_chart(run: RunData) -> Chart | None:
    """The error of matching of each layer and head, as a heat map; None without matching."""
    error = run.details.match_error
    if not error:
        return None
    heads, layers = len(error[0]), len(error)
    figure = new_figure("query head", "layer")
    flat = [(value, layer, head) for layer, values in enumerate(error) for head, value in enumerate(values)]
    drawn = [max(value, SMALLEST_ERROR) for value, _, _ in flat]
    ticks = log_axis(drawn).get("tickvals") or [min(drawn), max(drawn)]
    figure.add_heatmap(
        z=[[math.log10(max(value, SMALLEST_ERROR)) for value in layer] for layer in error],
        x=list(range(heads)),
        y=list(range(layers)),
        customdata=[list(layer) for layer in error],
        colorscale="Cividis",
        colorbar={
            "title": {"text": "error", "side": "right"},
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:.2g}" for tick in ticks],
            "thickness": 12,
        },
        hovertemplate="layer %{y}, head %{x}: %{customdata:.3g}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", dtick=max(1, layers // 10))
    figure.update_xaxes(dtick=max(1, heads // 10))
    worst, layer, head = max(flat)
    summary = (
        "The squared error of what a head gives with the matched prompt, before training, relative to what it gives "
        f"with the context: {number(fmean(value for value, _, _ in flat))} on average, and most in layer {layer}, "
        f"head {head}: {number(worst)}. Measured on rows that no step of refinement used."
    )
    return Chart("heads", "Error of matching by layer and head", summary, figure, max(280, min(640, 90 + 16 * layers)))


def students_of(examples: Iterable[ExampleDetails]) -> list[str]:
    """The keys of the students that were measured on any of the examples, in the order of the table."""
    found = {student for example in examples for student in example.kl}
    return [student for student in STUDENT_NAMES if student in found]


def _mean(examples: Sequence[ExampleDetails], student: str) -> float | None:
    values = [kl for example in examples for kl in example.kl.get(student, ())]
    return fmean(values) if values else None


def _label(title: str, family: str) -> str:
    return f"{title}<br>{escape(family, quote=False)}"  # Plotly reads tags


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _weighted(means: Sequence[float], counts: Sequence[int], part: slice) -> float:
    return sum(m * c for m, c in zip(means[part], counts[part], strict=True)) / sum(counts[part])
