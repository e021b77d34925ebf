"""The hay: plain sentences from a seed that say nothing a question asks for, and facts put between them at any depth.

    text(m) = m lines of hay, with line i of a fact at depth u_i · m,  u_i uniform in [0, 1), ascending within a fact

The number of lines is the largest whose text has at most the wanted length; it is found by bisection.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from softprompt_kernels.errors import SoftPromptError

_WHO = (
    "the gardener", "a traveller", "the old teacher", "my neighbour", "the night nurse", "a young carpenter",
    "the postman", "an early guest", "the children", "the cook", "a stranger", "the watchmaker",
)  # fmt: skip
_DOES = (
    "walked along", "looked at", "spoke of", "painted", "remembered", "waited near", "drew a map of", "cleaned",
    "asked about", "slept beside", "sang of", "returned to",
)  # fmt: skip
_WHAT = (
    "the wooden bridge", "the quiet garden", "the long wall", "the empty market", "the chapel", "the orchard",
    "the stone steps", "the mill pond", "the meadow", "the narrow lane", "the green door", "the station clock",
)  # fmt: skip
_WHEN = (
    "before the rain came", "while the bells rang", "in the first snow", "after a long dinner", "without a word",
    "as the light faded", "every other morning", "with great patience", "on the way home", "until it was dark",
)  # fmt: skip


def sentences(draw: random.Random) -> Iterator[str]:
    """Sentences without end, drawn from a few thousand."""
    while True:
        text = f"{draw.choice(_WHO)} {draw.choice(_DOES)} {draw.choice(_WHAT)} {draw.choice(_WHEN)}."
        yield text[0].upper() + text[1:]


def hide(
    facts: Sequence[Sequence[str]],
    hay: Iterator[str],
    count_tokens: Callable[[str], int],
    length: int,
    draw: random.Random,
    joint: str = " ",
) -> str:
    """A text of about `length` tokens, at most that, which holds all lines of all facts.

    Args:
        facts: the lines of each fact, which keep their order.
        hay: lines without end.
        count_tokens: the tokens of a text.
        length: the most tokens of the text.
        draw: chooses the depths.
        joint: what stands between two lines.

    Raises:
        SoftPromptError: the facts alone are longer.
    """
    placed: list[tuple[float, str]] = []
    for lines in facts:
        depths = sorted(draw.random() for _ in lines)
        placed += zip(depths, lines, strict=True)
    placed.sort(key=lambda pair: pair[0])
    taken: list[str] = []

    def text(rows: int) -> str:
        while len(taken) < rows:
            taken.append(next(hay))
        parts, start = [], 0
        for depth, line in placed:
            place = int(depth * (rows + 1))
            parts += [*taken[start:place], line]
            start = place
        return joint.join([*parts, *taken[start:rows]])

    least = count_tokens(text(0))
    if least > length:
        raise SoftPromptError(
            f"length: got {length} tokens, accepted is at least {least}, which the facts alone take; "
            "fewer needles need less"
        )
    fits, fails = 0, 1
    while count_tokens(text(fails)) <= length:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if count_tokens(text(middle)) <= length else (fits, middle)
    return text(fits)
