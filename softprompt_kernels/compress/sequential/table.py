"""What is left of a text by how long ago it was read, as a table of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHOLE, OWN = "whole text", "each segment's own"
"""The teachers in evaluation.json."""

HEADER = ["segments ago", "KL without context", "KL", "recovered", "top-1", "tokens"]


def teacher_line(segments: Mapping[str, Any]) -> str:
    """What the KL of a compression in segments is measured from.

    Args:
        segments: "segments" of evaluation.json.
    """
    if segments["teacher"] == WHOLE:
        return "The full context fits the window, so it is the whole text. Held-out queries by segment:"
    return (
        "The full text does not fit the window: the full context of a query is its segment, with the prompt of those "
        "before. Held-out queries by segment:"
    )


def distance_table(segments: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table, nearest first.

    Args:
        segments: "segments" of evaluation.json.
    """
    rows = []
    for found in segments["by_distance"]:
        ago = f"{found['from']}" if found["from"] == found["to"] else f"{found['from']} to {found['to']}"
        numbers = (found[name] for name in ("final_kl_none", "final_kl_prompt", "recovered", "top1_agreement"))
        rows.append([ago, *("-" if one is None else f"{one:.3f}" for one in numbers), str(found["answer_tokens"])])
    return HEADER, rows
