"""Cuts a context into segments: evenly where it is read, at random where a compressor is trained."""

from __future__ import annotations

import random


def even_lengths(tokens: int, longest: int) -> list[int]:
    """The lengths of as few segments as possible, of at most `longest` tokens each; they differ by at most one.

    Args:
        tokens: of the context, at least 1.
        longest: at least 1.
    """
    count = -(-tokens // longest)
    return [tokens * (i + 1) // count - tokens * i // count for i in range(count)]


def random_lengths(tokens: int, longest: int, count: int, draw: random.Random) -> list[int]:
    """The lengths of `count` segments, each from 1 to `longest`, with random cuts.

    Args:
        tokens: of the context.
        longest: of a segment.
        count: so that `count ≤ tokens ≤ count · longest`.
        draw: of the cuts.
    """
    lengths: list[int] = []
    for left in range(count, 0, -1):
        rest = tokens - sum(lengths)
        lengths.append(draw.randint(max(1, rest - (left - 1) * longest), min(longest, rest - (left - 1))))
    return lengths
