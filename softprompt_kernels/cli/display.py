"""Output on stdout: tables, pairs, answers and sizes. Coloured on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from softprompt_kernels.compress.report.answers import Comparison, comparison_text, printable
from softprompt_kernels.compress.report.table import table_text


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


def show_side_by_side(question: str, answers: dict[str, str]) -> None:
    """Print a question and its answers: as columns on a terminal, as indented lines elsewhere."""
    answers = {name: printable(text) for name, text in answers.items()}
    if not on_terminal():
        typer.echo(comparison_text(Comparison(question, answers)) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(question, style="bold"), title_justify="left", expand=True, header_style="bold")
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in answers.values()))
    Console().print(table)
