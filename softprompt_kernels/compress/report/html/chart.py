"""A chart of the report: a Plotly figure, and what a reader who cannot see it is told.

Colours are not set here. A trace or a shape names a role, and the page's script gives it the colour of the theme that
the reader prefers, again when that changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES

ROLES = (*STUDENT_NAMES, "loss", "marker")
"""What a colour may stand for: the students, the training loss, and a mark of one's own run."""

DASHES = {"none": "dot", "truncated": "dashdot", "untrained": "dash", "initial": "longdash", "prompt": "solid"}
SYMBOLS = {
    "none": "x",
    "truncated": "diamond",
    "untrained": "square",
    "initial": "triangle-up",
    "prompt": "circle",
}
PATTERNS = {"none": "/", "truncated": "x", "untrained": "-", "initial": "\\", "prompt": ""}
"""Students differ in more than their colour."""


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart.

    Args:
        key: its id on the page.
        title: its heading.
        summary: one or two sentences with its figures, shown below it, and read instead of it.
        figure: without colours.
        height: in pixels.
    """

    key: str
    title: str
    summary: str
    figure: go.Figure
    height: int = 340

    @property
    def data(self) -> str:
        """Traces and layout as JSON that can stand inside a script element."""
        figure = json.loads(self.figure.to_json())
        chosen = {"data": figure["data"], "layout": figure["layout"]}
        return json.dumps(chosen, separators=(",", ":")).replace("<", "\\u003c")


def new_figure(x: str, y: str, **layout: Any) -> go.Figure:
    """An empty figure with named axes.

    Args:
        x, y: the titles of the axes.
        layout: more of Plotly's layout; of the axes, what differs.
    """
    axis = {"automargin": True, "zeroline": False}
    default = {
        "template": "none",
        "xaxis": {"title": {"text": x}, **axis, **layout.pop("xaxis", {})},
        "yaxis": {"title": {"text": y}, **axis, **layout.pop("yaxis", {})},
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "hovermode": "closest",
        "dragmode": False,
    }
    return go.Figure(layout=default | layout)


def add_line(
    figure: go.Figure, x: Sequence[float], y: Sequence[float | None], name: str, role: str, **options: Any
) -> None:
    """A line in the colour of a role, and for a student with its dashes and marks."""
    style: dict[str, Any] = {"mode": "lines", "line": {"width": 2, "dash": DASHES.get(role, "solid")}}
    marker: Mapping[str, Any] = {"symbol": SYMBOLS.get(role, "circle"), "size": 7}
    figure.add_scatter(x=list(x), y=list(y), name=name, meta={"role": role}, **(style | {"marker": marker} | options))


def log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis for these values, with ticks at 1, 2 and 5 in each power of ten where they span some."""
    positive = [value for value in values if value is not None and 0 < value < math.inf]
    axis: dict[str, Any] = {"type": "log"}
    if positive and max(positive) >= 5 * min(positive):
        powers = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
        steps = (1, 2, 5) if len(powers) <= 4 else (1,)
        ticks = [step * 10.0**power for power in powers for step in steps]
        axis |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return axis


def number(value: float) -> str:
    """A figure with three digits."""
    return f"{value:.3g}"
