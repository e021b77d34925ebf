"""Answers beside each other: one question with the answers of several models, as text, and many as a page of Markdown.

> Who keeps the mill?
  full context | Mira Vale keeps it.
  soft prompt  | Mira Vale.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 100
"""Columns of an answer on the page. A code block does not wrap its lines by itself."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Comparison:
    """A question and the answers to it, by the name of what the model has read before it."""

    question: str
    answers: Mapping[str, str]


def comparison_text(comparison: Comparison, width: int | None = None) -> str:
    """A question, and below it the answers behind their names.

    Args:
        comparison: the question and its answers.
        width: longer lines are wrapped to so many columns; None: not wrapped.
    """
    names = max(map(len, comparison.answers))
    lines = [f"> {line}" for line in _lines(comparison.question, width)]
    for name, text in comparison.answers.items():
        first, *rest = _lines(text, width)
        lines.append(f"  {name.ljust(names)} | {first}".rstrip())
        lines += [f"  {' ' * names} | {line}".rstrip() for line in rest]
    return "\n".join(lines)


def answers_page(sections: Mapping[str, Sequence[Comparison]], new_tokens: int, temperature: float) -> str:
    """Questions and answers as a page of Markdown.

    Each question is a code block, so nothing in a question or an answer is taken for Markdown.

    Args:
        sections: the questions of each set, by the name of the set.
        new_tokens, temperature: how the answers were sampled, for the introduction.
    """
    how = (
        f"The models' answers are sampled at temperature {temperature:g} with the same random numbers."
        if temperature
        else "Each token of a model's answer is the most likely one."
    )
    parts = [
        "# Answers",
        "Questions that the soft prompt was not trained on, answered with the full context (or by who gave "
        f"the question) and with the soft prompt instead. {how} An answer has at most {new_tokens} tokens.",
    ]
    for name, comparisons in sections.items():
        same = sum(len(set(comparison.answers.values())) == 1 for comparison in comparisons)
        parts.append(f"## {name[0].upper()}{name[1:]} queries")
        parts.append(f"Questions: {len(comparisons)}. Word for word the same answer: {same}.")
        parts += [_code_block(comparison_text(comparison, WIDTH)) for comparison in comparisons]
    return "\n\n".join(parts) + "\n"


def printable(text: str) -> str:
    """A text whose control characters are replaced, except tabs and line feeds. A random model writes all of them."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _lines(text: str, width: int | None) -> list[str]:
    """The lines of a text, at least one."""
    lines = text.strip().splitlines() or [""]
    if width is None:
        return lines
    return [part for line in lines for part in textwrap.wrap(line, width, replace_whitespace=False) or [""]]


def _code_block(text: str) -> str:
    """A code block that the text cannot end."""
    text = printable(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
