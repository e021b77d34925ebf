"""Accuracy of answers where the right ones are known: from 0 to 1, more is better.

A question may have several references. What they mean depends on the metric:

    exact match    1 if the answer equals one of them, as in SQuAD (arXiv 1606.05250), else 0
    F1             the best F1 of the words, as in SQuAD and QASPER (arXiv 2105.03011)
    contains       1 if one of them stands in the answer as whole words, else 0
    contains all   the share of them that stand in the answer as whole words, as in RULER (arXiv 2404.06654), which does
                   not ask for whole words
    choice         of a multiple-choice question, whose references are the letter and the text of the right option: 1 if
                   the answer gives that letter, or no letter and that text (LongHealth, arXiv 2401.14490), else 0
    chrF           F-score of character n-grams over all answers together (Popović 2015), divided by 100, from the
                   package sacrebleu; MTOB (arXiv 2309.16575) is scored with it

Normalisation and words are those of `dissimilarity.py`. The value of a set is the mean over questions, except for chrF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from softprompt_kernels.compress.evaluate.dissimilarity import normalised, normalised_words, word_f1
from softprompt_kernels.errors import SoftPromptError

_SAID_LETTER = re.compile(
    r"\b(?i:answer|option|choice)\b[^A-Za-z]*(?:is\b[^A-Za-z]*)?(?i:option\b[^A-Za-z]*)?([A-E])\b(?!')"
)
_LEADING_LETTER = re.compile(r"\W*([A-E])\W*(?:[).:,\n]|$)")


def _exact_match(answer: str, references: Sequence[str]) -> float:
    return float(any(normalised(answer) == normalised(one) for one in references))


def _f1(answer: str, references: Sequence[str]) -> float:
    return max(word_f1(answer, one) for one in references)


def _contains(answer: str, references: Sequence[str]) -> float:
    return float(any(_stands_in(one, answer) for one in references))


def _contains_all(answer: str, references: Sequence[str]) -> float:
    return sum(_stands_in(one, answer) for one in references) / len(references)


def _choice(answer: str, references: Sequence[str]) -> float:
    letter, text = references
    found = _SAID_LETTER.search(answer) or _LEADING_LETTER.match(answer)
    return float(found[1] == letter if found else _stands_in(text, answer))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": _exact_match,
    "f1": _f1,
    "contains": _contains,
    "contains_all": _contains_all,
    "choice": _choice,
}
"""The metrics of single answers, by their key. Beside these there is "chrf"."""

GENERAL_METRICS = ("exact_match", "f1", "contains")
"""Those of a file of queries with references."""


def accuracy(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The accuracy of the answers to a set of questions.

    Args:
        metric: a key of `METRICS`, or "chrf".
        answers: at least one.
        references: of each question, at least one.

    Raises:
        SoftPromptError: the metric needs a package that is not installed.
    """
    if metric == "chrf":
        return _chrf(answers, references)
    score = METRICS[metric]
    return sum(score(answer, known) for answer, known in zip(answers, references, strict=True)) / len(answers)


def check_metric(metric: str) -> None:
    """Raise SoftPromptError if the package that a metric needs is not installed; `metric` as in `accuracy`."""
    if metric == "chrf":
        try:
            import sacrebleu  # noqa: F401
        except ImportError as error:
            raise SoftPromptError(
                'metric: chrF needs the package sacrebleu: pip install --editable ".[suites]"'
            ) from error


def _chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    check_metric("chrf")
    from sacrebleu.metrics import CHRF

    most = max(map(len, references))
    columns: Any = [  # None where an answer has fewer references than others, as sacrebleu wants it
        [known[number] if number < len(known) else None for known in references] for number in range(most)
    ]
    return float(CHRF().corpus_score(list(answers), columns).score) / 100


def _stands_in(reference: str, answer: str) -> bool:
    """Whether the words of a reference stand in an answer, one behind the other; its characters if it has no words."""
    wanted, given = normalised_words(reference), normalised_words(answer)
    if not wanted:
        return reference.strip() in answer
    return any(given[start : start + len(wanted)] == wanted for start in range(len(given) - len(wanted) + 1))
