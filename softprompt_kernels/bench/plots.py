"""Plots of a run: time and memory against each size that grows while the others stay, one file for each op and pass.

Both axes are logarithmic. The dashed line is the floor: in the left panel the time of the op's bound at the reference's
rate, in the right one the bytes of the results.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from softprompt_kernels.bench.measure import Row
from softprompt_kernels.bench.plan import DTYPES
from softprompt_kernels.testing.cases import case

AXES = {
    "B": "B, sequences",
    "P": "P, prompt tokens",
    "M": "N = M, tokens of a sequence",
    "N": "N, tokens",
    "V": "V, vocabulary",
}


class Curve(NamedTuple):
    """Rows of one op, pass and dtype that differ in one size, by implementation."""

    op: str
    pass_: str
    dtype: str
    letter: str
    fixed: str  # the other sizes
    rows: dict[str, list[tuple[int, Row]]]  # by implementation, sizes growing


def curves(rows: Sequence[Row]) -> list[Curve]:
    """All curves of at least two sizes, the longest for each op, pass and letter."""
    found: dict[tuple[str, str, str, str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        sizes = case(row.op, row.shape).sizes
        for letter in sizes.keys() & AXES.keys():
            fixed = " ".join(f"{name}{'/'.join(map(str, size))}" for name, size in sizes.items() if name != letter)
            by_name = found.setdefault((row.op, row.pass_, row.dtype, letter, fixed), {})
            by_name.setdefault(row.implementation, {})[sizes[letter][0]] = row
    made: dict[tuple[str, str, str, str], Curve] = {}
    for (op, pass_, dtype, letter, fixed), by_name in found.items():
        points = {name: sorted(sized.items()) for name, sized in by_name.items()}
        key = (op, pass_, dtype, letter)
        if max(map(len, points.values())) < 2:
            continue
        if key not in made or _points(points) > _points(made[key].rows):
            made[key] = Curve(*key, fixed, points)
    return sorted(made.values(), key=lambda curve: curve[:4])


def _points(rows: dict[str, list[tuple[int, Row]]]) -> int:
    return sum(map(len, rows.values()))


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write one PNG for each curve into a folder; returns their paths."""
    with patch.dict(os.environ, MPLBACKEND="Agg"):  # the shell of a notebook may name a backend that is not there
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator

    paths = []
    for curve in curves(rows):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for name, points in curve.rows.items():
            sizes = [size for size, _ in points]
            ours = points[0][1].ours
            style = {"marker": "o", "markersize": 4, "label": name, "linewidth": 2 if ours else 1}
            time.plot(sizes, [1e3 * row.seconds for _, row in points], **style)
            if all(row.footprint is not None for _, row in points):
                memory.plot(sizes, [row.footprint.peak / 2**20 for _, row in points if row.footprint], **style)
        shown = sorted({size for points in curve.rows.values() for size, _ in points})
        floors = _floors(curve)
        if floors:
            grey = {"color": "grey", "linestyle": "--", "linewidth": 1, "label": "floor"}
            time.plot([size for size, *_ in floors], [1e3 * seconds for _, seconds, _ in floors], **grey)
            memory.plot([size for size, *_ in floors], [bytes_ / 2**20 for *_, bytes_ in floors], **grey)
        for panel, label in ((time, "time, ms"), (memory, "peak memory above the inputs, MiB")):
            panel.set(xscale="log", yscale="log", xlabel=AXES[curve.letter], ylabel=label)
            panel.set_xticks(shown, [str(size) for size in shown])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.grid(True, which="major", linewidth=0.3)
            panel.legend(fontsize=8)
        figure.suptitle(f"{curve.op}, {curve.pass_}, {curve.dtype}, {curve.fixed}", fontsize=10)
        name = f"{curve.op}-{curve.pass_.replace('+', '-')}-{curve.dtype}-{curve.letter}.png"
        figure.savefig(folder / name, dpi=120)
        paths.append(folder / name)
    return paths


def _floors(curve: Curve) -> list[tuple[int, float, int]]:
    """Size, seconds and bytes of results, from the implementation with the most points."""
    points = max(curve.rows.values(), key=len)
    return [
        (size, row.floor_seconds, case(row.op, row.shape).result_bytes(row.pass_, DTYPES[row.dtype]))
        for size, row in points
        if row.floor_seconds is not None
    ]
