"""The table of a run, and the list of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from softprompt_kernels.bench.measure import LeftOut, Measured, Row
from softprompt_kernels.bench.reference import GEMM

LEGEND = """\
time       median over rounds in which all implementations of a problem took turns, waiting for a CPU left out
% of floor the least time that the op's GEMMs (or one pass over its memory) take at the rate that the machine
           showed beside each measurement, over the time; above 100 % where an implementation beats torch.mm,
           or finds its inputs in the cache
rate       GFLOP/s of the op's GEMMs, or GB/s of its inputs and results where memory is the bound
peak       most memory above the inputs; "kept" is what is left while the results are alive
error      ‖result − float64‖ / ‖float64‖, of the worst result"""
BUSY = 0.1  # share of other processes above which times mean little


def tables(measured: Measured) -> RenderableType:
    """The rows, and below them what was left out."""
    parts: list[RenderableType] = [_table(measured.rows), Text(LEGEND)]
    if checked := {row.checked_shape for row in measured.rows if row.checked_shape != row.shape}:
        parts.append(Text(f"           large problems were checked at {', '.join(sorted(checked))}"))
    if measured.left_out:
        parts.append(Text("\nLeft out"))
        parts += [Text(f"  {line}") for line in _left_out(measured.left_out)]
    if measured.other_load > BUSY:
        parts.append(
            Text(
                f"\nOther processes took up to {measured.other_load:.0%} of the CPU time. Caches and memory are "
                "shared, so the times are too long."
            )
        )
    return Group(*parts)


def console() -> Console:
    """Prints on the terminal's width, or on 120 columns."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=120)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("problem, implementation", overflow="fold")
    for name in ("time", "% of floor", "rate", "peak", "kept", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, ((op, shape, dtype, pass_), group) in enumerate(groupby(rows, key=lambda row: row.problem)):
        if number:
            table.add_row()
        table.add_row(f"{op} {shape}", style="bold")
        table.add_row(f"{pass_}, {dtype}", style="bold")
        for row in group:
            table.add_row(f"  {row.implementation}", *_cells(row), style="green" if row.ours else None)
    return table


def _cells(row: Row) -> list[str]:
    floor = row.floor_seconds
    rate = row.work / row.seconds / 1e9
    unit = "GFLOP/s" if row.bound == GEMM else "GB/s"
    memory = row.footprint
    return [
        milliseconds(row.seconds),
        "–" if floor is None else f"{100 * floor / row.seconds:.0f} %",
        "–" if floor is None else f"{rate:.3g} {unit}",
        "–" if memory is None else mebibytes(memory.peak),
        "–" if memory is None else mebibytes(memory.retained),
        f"{row.error:.0e}",
    ]


def milliseconds(seconds: float) -> str:
    """Such as "12.3 ms"."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def mebibytes(count: int) -> str:
    """Such as "12.3 MiB"."""
    return f"{count / 2**20:.1f} MiB"


def _left_out(missing: Sequence[LeftOut]) -> list[str]:
    """One line an implementation and reason, with the ops that it holds for."""
    lacking: dict[str, list[str]] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for one in missing:
        if one.reason == f"it has no {one.op}":
            lacking.setdefault(one.implementation, []).append(one.op)
        else:
            found.setdefault((one.implementation, one.reason), []).append(one.op)
    lines = [f"{name}: {reason} ({', '.join(dict.fromkeys(ops))})" for (name, reason), ops in sorted(found.items())]
    return [*lines, *(f"{name} has no {', '.join(dict.fromkeys(ops))}" for name, ops in lacking.items())]
