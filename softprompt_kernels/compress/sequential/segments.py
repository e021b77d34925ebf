"""A long text cut into segments.

The text is encoded once, as a whole, and its tokens are cut. So the segments, read one after the other, are exactly the
tokens of the whole text. What the chat template puts before a text is in the first one. What it puts behind, such as
the end of the system turn, is in all of them, so that a query can follow each.

Segments are about equally long. A cut is moved to the end of a paragraph, or else of a sentence, that is near; in a
text without either it stays where it is, between two tokens.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor, tensor

from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.encoder import Tokens
from softprompt_kernels.compress.text_file import trim

SHORTEST = 0.7
"""The least length of a segment, in that of an even one: how far a cut is moved back."""

_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SENTENCE = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]|\n")


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of the tokens of a text.

    Args:
        number: from 1.
        ids: `[1, S]` int64.
        text: what is written there.
        pieces: the same in short runs, each with the ids that a chat has when the text ends there, and its text.
    """

    number: int
    ids: Tensor
    text: str
    pieces: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def tokens(self) -> int:
        """S, with what the chat template adds."""
        return self.ids.shape[1]


def cut(chat: ChatFormat, text: str, most: int, piece: int) -> list[Segment]:
    """The segments of a text.

    Args:
        chat: its format.
        text: not blank.
        most: tokens of a segment.
        piece: tokens of a piece of a segment.
    """
    tokens, text = chat.context_tokens(text), trim(text)
    places = _Places(tokens, text)
    behind = bisect_left(places.starts, len(text))  # what the template puts behind the text
    tail = tokens.ids[behind:]

    def run(first: int, last: int) -> tuple[tuple[int, ...], str]:
        end = len(text) if last == behind else max(0, places.starts[last])
        return (*tokens.ids[first:last], *tail), text[max(0, places.starts[first]) : end]

    found = []
    for number, (first, last) in enumerate(pairwise(places.cuts(0, behind, most - len(tail))), 1):
        ids, own = run(first, last)
        pieces = tuple(run(*part) for part in pairwise(places.cuts(first, last, piece)))
        found.append(Segment(number, tensor([ids]), own, pieces))
    return found


class _Places:
    """Where a text may be cut.

    Args:
        tokens: of the text.
        text: the text.
    """

    def __init__(self, tokens: Tokens, text: str) -> None:
        self.starts = [start for start, _ in tokens.spans]
        ends = [0, *accumulate((end for _, end in tokens.spans), max)]  # of all tokens before
        whole = [index for index, start in enumerate(self.starts) if start >= ends[index]]
        self.kinds = [
            sorted({bisect_left(self.starts, found.end()) for found in kind.finditer(text)} & set(whole))
            for kind in (_PARAGRAPH, _SENTENCE)
        ]
        self.kinds.append(whole)

    def cuts(self, first: int, last: int, most: int) -> list[int]:
        """The tokens where runs of at most `most` tokens begin, from `first`, and `last`."""
        places = [first]
        while last - places[-1] > most:
            begin, left = places[-1], last - places[-1]
            count = math.ceil(left / most)
            even, enough = left / count, left - (count - 1) * most  # after a shorter run, one more would be needed
            short = max(1, math.ceil(SHORTEST * even))
            tries = [(kind, max(short, enough)) for kind in self.kinds[:2]] + [(kind, short) for kind in self.kinds]
            near = next(
                (found for kind, low in tries if (found := _within(kind, begin + low, begin + most))),
                [begin + round(even)],
            )
            places.append(min(near, key=lambda index: abs(index - begin - even)))
        return [*places, last]


def _within(numbers: list[int], low: int, high: int) -> list[int]:
    """Those of ascending numbers from `low` to `high`."""
    return numbers[bisect_left(numbers, low) : bisect_left(numbers, high + 1)]
