"""Dissimilarities s(ŷ, ŷ_σ) of two decoded answers: 0 for the same, 1 for nothing in common. Less is better, as for KL.

    mismatch        0 if the two normalised texts are equal, else 1
    edit distance   Levenshtein distance of the texts, divided by the length of the longer one; runs of blanks are one
    F1 distance     1 − F1 of the normalised words: F1 = 2 · |common| / (|words of one| + |words of the other|)

Normalised is as in SQuAD (arXiv 1606.05250): lower case, without punctuation and the articles a, an, the, and with
single blanks. Punctuation of all scripts counts, and a text of nothing but articles keeps them. Words are what blanks
separate; of Chinese, Thai and other scripts without blanks between words each letter with its marks is a word.

Such numbers are for people. They are not differentiable, so nothing is trained on them.
"""

from __future__ import annotations

import math
import numbers
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from softprompt_kernels.compress.sources.named_function import load_function
from softprompt_kernels.compress.sources.scripts import words
from softprompt_kernels.errors import SoftPromptError

Dissimilarity = Callable[[str, str], float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """A text in lower case, without punctuation and English articles, with single blanks."""
    kept = "".join(one for one in unicodedata.normalize("NFC", text).lower() if not _is_punctuation(one))
    return " ".join(_ARTICLES.sub(" ", kept).split()) or " ".join(kept.split())


def normalised_words(text: str) -> list[str]:
    """The words of the normalised text."""
    return words(normalised(text))


def mismatch(one: str, other: str) -> float:
    """0 if two texts are equal after normalisation, else 1."""
    return float(normalised(one) != normalised(other))


def edit_distance(one: str, other: str) -> float:
    """Characters to insert, delete or replace between two texts, divided by the length of the longer one."""
    texts = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (one, other))
    return float(Levenshtein.normalized_distance(*texts))


def f1_distance(one: str, other: str) -> float:
    """1 − F1 of the words of two texts. Two texts without words are the same."""
    return 1 - word_f1(one, other)


def word_f1(one: str, other: str) -> float:
    """F1 of the words of two texts: the harmonic mean of precision and recall."""
    mine, theirs = Counter(normalised_words(one)), Counter(normalised_words(other))
    if not mine and not theirs:
        return 1.0
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())


DISSIMILARITIES: dict[str, Dissimilarity] = {
    "mismatch": mismatch,
    "edit_distance": edit_distance,
    "f1_distance": f1_distance,
}
"""Those that every evaluation reports, by their key."""


def mean_dissimilarity(name: str, function: Dissimilarity, ones: Sequence[str], others: Sequence[str]) -> float:
    """The mean over pairs of answers.

    Args:
        name, function: the dissimilarity.
        ones, others: the answers to the same questions, at least one.

    Raises:
        SoftPromptError: a function of the user raises, or returns something else than a number from 0 to 1.
    """
    total = 0.0
    for one, other in zip(ones, others, strict=True):
        try:
            value: Any = function(one, other)
        except Exception as error:
            raise SoftPromptError(
                f"dissimilarity: {name} raised {type(error).__name__} ({error}) for {one[:40]!r} and {other[:40]!r}"
            ) from error
        number = float(value) if isinstance(value, numbers.Real) else math.nan
        if not 0 <= number <= 1:
            raise SoftPromptError(
                f"dissimilarity: {name} gave {value!r} for {one[:40]!r} and {other[:40]!r}, "
                "accepted is a number from 0 (the same) to 1"
            )
        total += number
    return total / len(ones)


def load_dissimilarity(name: str) -> Dissimilarity:
    """The function that `name` ("package.module:function") names. Its module is imported, which runs it.

    Raises:
        SoftPromptError: the name has another form, or there is no such module or function.
    """
    return load_function("dissimilarity", name, "a function of two texts")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
