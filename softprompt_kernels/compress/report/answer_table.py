"""Whole answers and forgetting as text: the second table of `softprompt evaluate`, and the lines below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES

TITLES = {
    "mismatch": "mismatch",
    "edit_distance": "edit distance",
    "f1_distance": "1 - F1",
    "exact_match": "exact match",
    "f1": "F1",
    "contains": "contains",
    "contains_all": "found",
    "choice": "right choice",
    "chrf": "chrF",
}
"""What a dissimilarity or a metric is called in the table; others have their own name."""

ANSWER_LEGEND = (
    "Greedy answers. mismatch, edit distance, 1 - F1: mean distance from the full context's answer, 0 is the same."
)
"""The meaning of the columns that are always there, printed below the table."""


def answer_table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of answers, as text.

    Each row is a student, and the last one the full context. The columns are the dissimilarities from the answers of
    the full context, then the accuracies where the queries have references.

    Args:
        figures: "answers" of `softprompt evaluate`.
    """
    distances, accuracies = figures["dissimilarity"], figures.get("accuracy", {})
    header = ["model with", *(TITLES.get(name, name) for name in distances)]
    header += [f"right ({TITLES.get(name, name)})" for name in accuracies]
    rows = []
    for key, name in {**STUDENT_NAMES, "full": "full context"}.items():
        if key == "full" or key in distances["mismatch"]:
            cells = [0.0 if key == "full" else of_all[key] for of_all in distances.values()]
            rows.append([name, *(f"{cell:.3f}" for cell in (*cells, *(of[key] for of in accuracies.values())))])
    return header, rows


def answer_remark(figures: Mapping[str, Any]) -> str:
    """The legend of the table, with what the accuracies are of; `figures` as in `answer_table`."""
    text, cut_off = ANSWER_LEGEND, figures["cut_off"]["full"]
    if "accuracy" in figures:
        text += (
            f" right: accuracy on the {figures['questions']} of {figures['queries']} queries that have references, "
            "1 is all right."
        )
    if cut_off:
        text += f" {cut_off} of {figures['queries']} answers of the full context were cut off by --new-tokens."
    return text


def forgetting_remark(figures: Mapping[str, Any]) -> str:
    """Forgetting in one line.

    Args:
        figures: "forgetting" of `softprompt evaluate`.
    """
    parts = [
        f"{name} KL {figures[f'kl_{key}']:.3f}, perplexity {figures[f'perplexity_{key}']:.2f}"
        for key, name in (("prompt", "soft prompt"), ("full", "full context"))
        if f"kl_{key}" in figures
    ]
    return (
        f"Unrelated text ({figures['tokens']} tokens), from the model without a prompt: {'; '.join(parts)}; "
        f"no context perplexity {figures['perplexity_none']:.2f}."
    )


def suite_remark(figures: Mapping[str, Any]) -> str:
    """What a suite asked, and which of the tested facts training has named.

    Args:
        figures: from `evaluate_suite`, with "suite".
    """
    suite, students = figures["suite"], figures["answers"]["accuracy"][figures["suite"]["metric"]]
    text = (
        f"Suite {suite['name']}: {figures['context_tokens']} tokens in a prompt of {figures['prompt_tokens']} "
        f"({figures['ratio']:.1f}x), {suite['test_questions']} test questions. "
        f"The full context itself answers {students['full']:.2f} of them right."
    )
    if "named_in_training" not in suite:
        return f"{text} None of them was asked in training."
    text += f" Training asked {suite['train_questions']} others; "
    named = suite["named_in_training"]
    text += f"its queries, with those of self-study, name the facts of {named} of the tested ones"
    shares = [
        f"{suite[key]['prompt']:.2f} of {name}"
        for key, name in (("accuracy_named", "these"), ("accuracy_not_named", "the others"))
        if key in suite
    ]
    return f"{text} (soft prompt right: {', '.join(shares)})."
