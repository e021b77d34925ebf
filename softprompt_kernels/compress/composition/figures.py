"""The figures of a composition: each document's queries, asked behind its own prompt and behind joined ones.

    alone      its own prompt
    naive      all prompts, keys as they are: each at 0..k_j−1, as PEFT's composition of adapters leaves them
    joined     all prompts, moved and without the sinks of all but the first (see `join.py`)
    prompt     the same, trained
    all        no prompt: the full texts of all documents, in one context

The teacher is the model behind the one document that a query asks about. So "all" says how much the other documents
disturb the model itself. "recovered" is 1 − KL / KL without context, and its mean over documents counts each the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from softprompt_kernels.compress.evaluate.distance import TokenDistances, check_context_matters, summary

STUDENTS = {
    "alone": "alone",
    "naive": "not moved",
    "joined": "joined",
    "prompt": "joined, trained",
    "all": "all texts",
}
"""The students of the table: the key in evaluation.json and the title of the column, in their order."""

LEGEND = (
    "recovered: 1 - KL / KL without context; the teacher has read the document that is asked about, and no other. "
    "alone: the document's own prompt. not moved: all prompts, keys as they are. joined: all prompts, keys moved. "
    "all texts: no prompt, the model with the full texts of all documents."
)
"""The meaning of the columns, printed below the table."""

Measured = dict[str, TokenDistances]
"""The distances of the students of one document and one set of queries, by key."""


def document_figures(measured: Measured) -> dict[str, float | int]:
    """The figures of one document on one set of queries.

    Args:
        measured: with "none", and any others.

    Raises:
        SoftPromptError: the context does not matter for these queries.
    """
    means = {name: found.mean() for name, found in measured.items()}
    none = means["none"].kl
    check_context_matters(none)
    return {
        **{f"kl_{name}": mean.kl for name, mean in means.items()},
        **{f"recovered_{name}": 1 - mean.kl / none for name, mean in means.items() if name != "none"},
        **{f"top1_agreement_{name}": mean.top1_agreement for name, mean in means.items()},
        "tokens": means["none"].tokens,
    }


def pooled_figures(of_documents: Sequence[Measured]) -> dict[str, float | int]:
    """The figures over the tokens of all documents together, with the keys of a set in any run's evaluation.json."""
    names = [name for name in of_documents[0] if all(name in measured for measured in of_documents)]
    return summary({name: _joined([measured[name] for measured in of_documents]).mean() for name in names})


def mean_figures(of_documents: Sequence[Mapping[str, float | int]]) -> dict[str, float]:
    """The means of "recovered" over documents, by student.

    Args:
        of_documents: from `document_figures`, of one set of queries.
    """
    return {
        name: sum(figures[f"recovered_{name}"] for figures in of_documents) / len(of_documents)
        for name in STUDENTS
        if all(f"recovered_{name}" in figures for figures in of_documents)
    }


def composition_table(figures: Mapping[str, Any], of_set: str) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of one set of queries: "recovered" by document and student, and its mean.

    Args:
        figures: the content of evaluation.json.
        of_set: "heldout" or "test".
    """
    documents = [(one["name"], one[of_set]) for one in figures["documents"] if of_set in one]
    mean = figures["mean"][of_set]
    students = [name for name in STUDENTS if name in mean and (name != "prompt" or figures["steps"])]
    title = {"heldout": "recovered, held-out", "test": "recovered, test"}[of_set]
    header = [title, *(STUDENTS[student] for student in students)]
    rows = [[name, *(f"{one[f'recovered_{student}']:.3f}" for student in students)] for name, one in documents]
    return header, [*rows, ["mean", *(f"{mean[student]:.3f}" for student in students)]]


def _joined(parts: Sequence[TokenDistances]) -> TokenDistances:
    return TokenDistances(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "agrees", "entropy", "teacher_entropy"))
    )
