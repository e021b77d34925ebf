"""Shapes as text: "B8 H14/2 M256 P128 D64". Each size is one letter and its number, or two numbers with a slash.

B  sequences                    N  tokens (rows)
H  query heads / key heads      d  size of a hidden state
M  queries = own keys           V  vocabulary
P  prompt tokens
D  head size
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LARGEST = 2**31


def parse_shape(text: str, letters: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The numbers of a shape by letter. Sizes may stand in any order.

    Args:
        text: such as "N512 d576 V49152"; commas between sizes are accepted too.
        letters: the letters that must be there, each once. "H" takes "14/2", or "14" for equal numbers of heads.

    Raises:
        ValueError: a size is missing, unknown, given twice or not from 1 to 2³¹ (P also accepts 0).
    """
    example = " ".join(f"{letter}8/2" if letter == "H" else f"{letter}64" for letter in letters)
    accepted = f"accepted is a number for each of {', '.join(letters)}, as in {example!r}"
    found: dict[str, tuple[int, ...]] = {}
    for part in text.replace(",", " ").split():
        match = re.fullmatch(r"([A-Za-z])(\d+)(?:/(\d+))?", part, flags=re.ASCII)
        if match is None or match[1] not in letters or (match[3] is not None and match[1] != "H"):
            raise ValueError(f"shape {text!r}: {part!r} is no size of this op; {accepted}")
        letter, numbers = match[1], [int(number) for number in match.groups()[1:] if number is not None]
        if letter in found:
            raise ValueError(f"shape {text!r}: {letter} is given twice; {accepted}")
        if not all((0 if letter == "P" else 1) <= number <= LARGEST for number in numbers):
            raise ValueError(f"shape {text!r}: {part!r} is out of range; sizes go from 1 to 2³¹, and P also accepts 0")
        found[letter] = (numbers[0], numbers[-1]) if letter == "H" else (numbers[0],)
    if missing := [letter for letter in letters if letter not in found]:
        raise ValueError(f"shape {text!r}: {', '.join(missing)} is missing; {accepted}")
    if "H" in found and found["H"][0] % found["H"][1]:
        raise ValueError(f"shape {text!r}: the number of query heads must be a multiple of that of key heads")
    return found


def show_shape(sizes: Mapping[str, tuple[int, ...]]) -> str:
    """The text of a shape, from its numbers by letter."""
    return " ".join(f"{letter}{'/'.join(map(str, numbers))}" for letter, numbers in sizes.items())
