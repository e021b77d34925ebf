"""The summary of a bank: a line for each context, their mean and spread, and the contexts that were skipped."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any


def counted(contexts: int) -> str:
    """A number of contexts in words."""
    return f"{contexts} context" + "s" * (contexts != 1)


def bank_summary(
    contexts: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """The summary of a bank, JSON-able.

    Args:
        contexts: by name, the content of evaluation.json of the finished contexts.
        skipped: by name, why the others have no prompt.
        seconds: of all runs.

    Returns:
        `contexts` and `skipped` as given; `heldout`, the mean, standard deviation and minimum over the contexts of
        recovered and of the held-out KL (nats per token); `seconds`.
    """
    figures = {name: [float(one["heldout"][name]) for one in contexts.values()] for name in ("recovered", "kl_prompt")}
    spread = {
        name: {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values), "least": min(values)}
        for name, values in figures.items()
        if values
    }
    return {"contexts": dict(contexts), "skipped": dict(skipped), "heldout": spread, "seconds": seconds}


def bank_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of the finished contexts, as text. The last row is their mean.

    Args:
        summary: from `bank_summary`.
    """
    header = ["context", "tokens", "ratio", "KL without", "held-out KL", "recovered", "top-1", "steps"]
    rows = []
    for name, figures in summary["contexts"].items():
        heldout = figures["heldout"]
        rows.append(
            [
                name,
                str(figures["context_tokens"]),
                f"{figures['ratio']:.1f}",
                *(f"{heldout[key]:.3f}" for key in ("kl_none", "kl_prompt", "recovered", "top1_agreement")),
                str(figures.get("steps", "-")),
            ]
        )
    if len(rows) > 1:
        spread = summary["heldout"]
        cells = [f"{spread[key]['mean']:.3f} ± {spread[key]['deviation']:.3f}" for key in ("kl_prompt", "recovered")]
        rows.append(["mean ± deviation", "", "", "", *cells, "", ""])
    return header, rows
