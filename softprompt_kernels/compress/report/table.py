"""The evaluation of a run as a table of text.

It only needs what a run has written (evaluation.json), so it can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softprompt_kernels.compress.evaluate.baselines import ROWS

SETS = (("heldout", "held-out"), ("train", "training"), ("queries", "given"))
"""Sets of queries in evaluation.json, and the one of `softprompt evaluate`."""

MISSING = "-"


def evaluation_table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the evaluation table, as text.

    A row says what stands before the query; columns are, for each set of queries, the KL of the teacher against it
    [nats per token], the recovered fraction `1 − KL/KL_none`, and how often both find the same token likeliest. The
    full context is the teacher itself, hence 0, 1, 1.

    Args:
        evaluation: as evaluation.json; a set that is not there has no columns, a figure that is not there is "-".
    """
    sets = [(evaluation[key], name) for key, name in SETS if isinstance(evaluation.get(key), Mapping)]
    header = ["before the query"]
    for _, name in sets:
        header += [f"{name} KL", "recovered", "top-1"]
    rows = []
    for key, name in ROWS:
        figures = [_figures(one, key) for one, _ in sets]
        if any(kl is not None for kl, _, _ in figures):
            rows.append([name, *(_format(value) for triple in figures for value in triple)])
    rows.append(["full context", *(_format(value) for _ in sets for value in (0.0, 1.0, 1.0))])
    return header, rows


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text: the first column to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *rest)).rstrip()

    return "\n".join((line(header), "  ".join("-" * width for width in widths), *map(line, rows)))


def _figures(one: Mapping[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    """(KL, recovered, agreement) of one row in one set."""
    kl, none = one.get(f"kl_{key}"), one.get("kl_none")
    recovered = 1 - kl / none if kl is not None and none else None
    return kl, recovered, one.get("top1_agreement" if key == "prompt" else f"top1_agreement_{key}")


def _format(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
