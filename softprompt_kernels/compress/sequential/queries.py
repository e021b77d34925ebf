"""What is asked about each segment of a long text.

Self-study asks about each segment. A query from a file is about the whole text. Its answer is given by the model that
has read the segment nearest to it, so each query belongs to one segment: the one that shares the rarest words with it,

    argmax_i Σ_{words w of the query in segment i} log(n / number of segments with w)

and the last of several that are equally near. A query that shares no such word belongs to the last segment, where the
model has the prompt of all others before it.

A prompt will be read before later text, and must not distract from it. What a query about later text makes of a prompt
is decided only beside that text. So a segment's prompt is also trained on queries about the next segment, each behind
the piece of that segment that is nearest to it; the teacher reads the same piece. None of them is evaluated.

Held-out queries are chosen among the inputs of all segments, so none of them is trained on anywhere. A general request
("What is this text about?") has another answer behind every segment. So it is neither asked again later nor evaluated,
except for the last segment, whose answer is that of the whole text.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.sequential.segments import Segment
from softprompt_kernels.compress.sources.queries import Query, hold_out, load_queries, remove_held_out
from softprompt_kernels.compress.sources.self_study import GENERAL, self_study
from softprompt_kernels.errors import SoftPromptError

READ_ON, PIECE = 64, 128
"""Queries about the next segment, and most tokens of the piece of it that is read before each."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class SegmentQueries:
    """The queries of one segment: for training, held out, and of the test file."""

    train: tuple[Query, ...]
    heldout: tuple[Query, ...]
    test: tuple[Query, ...]


def queries_by_segment(config: CompressConfig, segments: Sequence[Segment]) -> list[SegmentQueries]:
    """The queries of each segment.

    Raises:
        SoftPromptError: a file is invalid, or a segment has no query to train on, or none is held out.
    """
    nearest = Nearest([segment.text for segment in segments])

    def sorted_in(queries: Sequence[Query]) -> list[list[Query]]:
        found: list[list[Query]] = [[] for _ in segments]
        for query in queries:
            index = -1 if query.input in GENERAL else nearest(f"{query.input} {query.output or ''}")
            found[index].append(query)
        return found

    test = [] if config.test is None else load_queries(config.test)
    heldout = [] if config.heldout is None else load_queries(config.heldout)
    given = [] if config.queries is None else load_queries(config.queries)
    known = {query.input for query in (*given, *test, *heldout)}
    train = sorted_in(remove_held_out(given, [*test, *heldout]))
    for segment, own in zip(segments, train, strict=True):
        own += [q for q in self_study(segment.text, config.selfstudy, config.seed) if q.input not in known]
    held = sorted_in(heldout)
    if config.heldout is None:
        _, chosen = hold_out([query for own in train for query in own], config.heldout_share, config.seed)
        inputs = {query.input for query in chosen}
        held = [
            [query for query in own if query.input in inputs and (own is train[-1] or query.input not in GENERAL)]
            for own in train
        ]
        train = [[query for query in own if query.input not in inputs] for own in train]
    for segment, own in zip(segments, train, strict=True):
        if not own:
            raise SoftPromptError(
                f"queries: none is about segment {segment.number} of {len(segments)} "
                f"({' '.join(segment.text.split())[:40]!r}); accepted is at least one for each segment: ask more, or "
                "let selfstudy ask"
            )
    if not any(held):
        raise SoftPromptError("heldout: got no held-out query, accepted is at least one")
    ahead = [_read_on(later, asked, config.seed) for later, asked in zip(segments[1:], train[1:], strict=True)]
    samples = [[query for query in own for _ in range(config.samples if query.output is None else 1)] for own in train]
    parts = zip(samples, [*ahead, []], held, sorted_in(test), strict=True)
    return [SegmentQueries((*a, *b), tuple(c), tuple(d)) for a, b, c, d in parts]


def _read_on(later: Segment, asked: Sequence[Query], seed: int) -> list[Query]:
    """Queries about the next segment, each behind the piece of it that is nearest."""
    nearest = Nearest([text for _, text in later.pieces])
    about = [query for query in asked if query.input not in GENERAL]
    chosen = random.Random(seed + later.number).sample(about, min(READ_ON, len(about)))
    return [
        Query(query.input, family="read on", lead=later.pieces[nearest(f"{query.input} {query.output or ''}")][0])
        for query in chosen
    ]


class Nearest:
    """Finds the segment that a query is about; see the head of the file.

    Args:
        texts: of the segments.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.words = [_words(text) for text in texts]
        self.count = Counter(word for words in self.words for word in words)

    def __call__(self, query: str) -> int:
        """The index of the segment."""
        asked = _words(query)
        near = [
            sum(math.log(len(self.words) / self.count[word]) for word in sorted(asked & words)) for words in self.words
        ]
        best = max(near)
        return max(index for index, one in enumerate(near) if math.isclose(one, best, abs_tol=1e-9))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))
