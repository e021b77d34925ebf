"""Answers of the report: the tokens of the full context's answer with their KL, beside the soft prompt's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from softprompt_kernels.compress.evaluate.details import ExampleDetails
from softprompt_kernels.compress.report.answers import printable
from softprompt_kernels.compress.report.html.distance_charts import students_of

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Nats from which a token gets the next colour."""

MOST_ANSWERS = 40
"""Answers of a set that are shown. Each token is an element of the page."""


@dataclass(frozen=True)
class Piece:
    """One or more tokens that are shown as one: those of one character.

    Args:
        text: to show; a line feed is marked.
        kl: by student, summed over its tokens, nats.
        agrees: by student, whether all of them are the teacher's most likely ones.
        entropy: of the teacher, summed.
    """

    text: str
    kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    entropy: float

    def level(self, student: int) -> int:
        """The colour for one student, from 0."""
        return sum(self.kl[student] >= limit for limit in LEVELS)


@dataclass(frozen=True)
class ShownAnswer:
    """A question with both answers.

    Args:
        query, family: of the question.
        pieces: of the full context's answer.
        prompt_answer: of the soft prompt, as text; None if it was not asked.
        kl: mean over the tokens by student, nats.
    """

    query: str
    family: str
    pieces: tuple[Piece, ...]
    prompt_answer: str | None
    kl: tuple[float, ...]


@dataclass(frozen=True)
class AnswerSet:
    """Some answers of a set of queries.

    Args:
        title: of the set.
        total: how many answers the set has.
        students: the keys of the students that it was measured for; figures of an answer are in this order.
        answers: those that are shown.
    """

    title: str
    total: int
    students: tuple[str, ...]
    answers: tuple[ShownAnswer, ...]

    @property
    def prompt(self) -> int:
        """The place of the soft prompt among the students."""
        return self.students.index("prompt")


def answer_set(title: str, examples: Sequence[ExampleDetails]) -> AnswerSet:
    """The first answers of a set, in its order."""
    students = tuple(students_of(examples))
    shown = tuple(_shown(example, students) for example in examples[:MOST_ANSWERS])
    return AnswerSet(title, len(examples), students, shown)


def _shown(example: ExampleDetails, students: Sequence[str]) -> ShownAnswer:
    pieces, waiting = [], []
    for index, text in enumerate(example.tokens):
        waiting.append(index)
        if text or index + 1 == len(example.tokens):
            pieces.append(
                Piece(
                    printable(text).replace("\n", "↵\n"),
                    tuple(round(sum(example.kl[name][i] for i in waiting), 3) for name in students),
                    tuple(all(example.agrees[name][i] for i in waiting) for name in students),
                    round(sum(example.entropy[i] for i in waiting), 3),
                )
            )
            waiting = []
    means = tuple(fmean(example.kl[name]) if example.tokens else 0.0 for name in students)
    own = None if example.prompt_answer is None else printable(example.prompt_answer)
    return ShownAnswer(example.query, example.family, tuple(pieces), own, means)
