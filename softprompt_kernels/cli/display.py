"""Output on stdout: tables, pairs, durations and sizes. Coloured on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.compress.report.table import table_text

__all__ = ["duration", "on_terminal", "show_pairs", "show_table", "size"]


def on_terminal() -> bool:
    """Whether standard output is a terminal, and not a file or a pipe."""
    return sys.stdout.isatty()


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], highlight: str | None = None) -> None:
    """Print a table on standard output.

    Args:
        header, rows: the cells. The first column holds the names of the rows, the others hold figures.
        highlight: the name of the row to highlight.
    """
    if not on_terminal():
        typer.echo(table_text(header, rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row, style="bold green" if row[0] == highlight else None)
    Console().print(table)


def show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print one line for each name and value, with the values aligned."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        typer.echo(f"{name.ljust(width)}  {value}")


def size(count: int) -> str:
    """Bytes as "640 B" or "3.2 MB"; 1 MB is 10⁶ bytes."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
