"""The evaluation of a run as a table of text, made from evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES

SETS = (("heldout", "held-out"), ("test", "test"), ("train", "training"), ("queries", "given"))
"""The sets of queries: the key in evaluation.json, or of `softprompt evaluate`, and the name in the table."""

LEGEND = (
    "KL: in nats per token, from the model with the full context. recovered: 1 - KL / KL without context. "
    "top-1: agreement of the most likely token."
)
"""The meaning of the columns, printed below the table."""

MISSING = "-"


def evaluation_table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the evaluation table, as text.

    Each row is a student, named by what it reads before the query. The columns are, for each set of queries, the KL of
    the student from the teacher [nats per token], the recovered fraction `1 − KL/KL_none`, and the top-1 agreement. The
    last row is the teacher itself: 0, 1, 1.

    Args:
        evaluation: the content of evaluation.json. A missing set has no columns, a missing figure is "-".
    """
    sets = [(evaluation[key], name) for key, name in SETS if isinstance(evaluation.get(key), Mapping)]
    header = ["model with"]
    for _, name in sets:
        header += [f"{name} KL", "recovered", "top-1"]
    rows = []
    for key, name in STUDENT_NAMES.items():
        figures = [_figures(one, key) for one, _ in sets]
        if any(kl is not None for kl, _, _ in figures):
            rows.append([name, *(_format(value) for triple in figures for value in triple)])
    rows.append(["full context", *(_format(value) for _ in sets for value in (0.0, 1.0, 1.0))])
    return header, rows


def training_line(evaluation: Mapping[str, Any]) -> str:
    """What was decided during the training, in a sentence or two; empty if nothing was.

    Args:
        evaluation: the content of evaluation.json.
    """
    training = evaluation.get("training")
    if not isinstance(training, Mapping):
        return ""
    steps, of, saved = training["steps"], training["of"], training["saved_step"]
    stopped = f", stopped at step {steps} by a plateau of the held-out KL" if steps < of else ""
    changed = "".join(
        f", from step {change['step']} on with "
        + " and ".join(f"{name} {value}" for name, value in change.items() if name != "step")
        for change in training.get("changes", ())
    )
    if saved == steps and not (stopped or changed):
        return ""
    chosen = ", chosen by the held-out KL" if saved < steps else ""
    remark = " Its held-out figures are of the queries that chose it." if chosen and "test" not in evaluation else ""
    return f"Prompt of step {saved} of {of}{chosen}{stopped}{changed}.{remark}"


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text. The first column is aligned left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *rest)).rstrip()

    return "\n".join((line(header), "  ".join("-" * width for width in widths), *map(line, rows)))


def _figures(one: Mapping[str, Any], key: str) -> tuple[float | None, float | None, float | None]:
    """(KL, recovered, top-1 agreement) of one row in one set; None for a missing figure."""
    kl, none = one.get(f"kl_{key}"), one.get("kl_none")
    recovered = 1 - kl / none if kl is not None and none else None
    return kl, recovered, one.get("top1_agreement" if key == "prompt" else f"top1_agreement_{key}")


def _format(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"
