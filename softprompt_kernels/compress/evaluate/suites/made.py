"""Suites that are made from a seed, as in RULER (arXiv 2404.06654), with texts of their own. Nothing is downloaded.

| suite | a fact | its question | judged by |
|---|---|---|---|
| needle | a number of one thing; each fact is of another kind | the number | contains |
| multikey | the code of one of many people; all facts have the same form | the code of one of them | contains |
| multivalue | three keys of one of many people | all three numbers | contains all |
| variables | a chain of four variables: the first has a value, each next equals it | all names | contains all |
| pairs | a line `key: value`; the whole text is such lines | the value of a key | contains |

Of n facts half are asked in training and half in the test, chosen at random; the text holds all of them. Keys and
values are all different, and every value has five digits, so no value stands inside another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from softprompt_kernels.compress.evaluate.suites.haystack import hide, sentences
from softprompt_kernels.compress.evaluate.suites.suite import MADE, Suite
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.errors import SoftPromptError

VALUES_OF_A_KEY = 3
VARIABLES_OF_A_CHAIN = 4

_THINGS = (  # the thing, and the word that names it
    ("the password of the library", "library"),
    ("the number of the blue locker", "locker"),
    ("the weight of the bronze statue in grams", "statue"),
    ("the serial number of the piano", "piano"),
    ("the size of the vineyard in square metres", "vineyard"),
    ("the telephone number of the baker", "baker"),
    ("the price of the white horse in crowns", "horse"),
    ("the number on the badge of the captain", "captain"),
    ("the length of the canal in metres", "canal"),
    ("the alarm code of the museum", "museum"),
    ("the postcode of the lighthouse", "lighthouse"),
    ("the licence number of the ferry", "ferry"),
    ("the number of books in the monastery", "monastery"),
    ("the votes for the mayor", "mayor"),
    ("the room in the tank in litres", "tank"),
    ("the number of steps to the castle", "castle"),
)
_FIRST = ("Ada", "Bela", "Cora", "Dario", "Edda", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karla", "Leon", "Mira")
_LAST = ("Adler", "Brook", "Castell", "Dorn", "Eklund", "Farrow", "Grimm", "Holt", "Ivers", "Jensen", "Kron", "Lund")
_FIRST_OF_KEY = ("amber", "brisk", "coral", "dusty", "early", "frosty", "gentle", "hollow", "ivory", "jolly", "keen")
_LAST_OF_KEY = ("otter", "badger", "cedar", "drum", "ember", "falcon", "grove", "harbor", "island", "jacket", "kettle")
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
_NUMBER_ALONE = "Answer with the number alone."


@dataclass(frozen=True)
class _Fact:
    """The lines that stand in the text, the question, its references, and the words that name the fact."""

    lines: tuple[str, ...]
    question: str
    references: tuple[str, ...]
    subject: tuple[str, ...]


class _Drawn:
    """Numbers and names from a seed, none twice."""

    def __init__(self, draw: random.Random) -> None:
        self.numbers = _different(lambda: str(draw.randrange(10_000, 100_000)), 90_000)
        self.variables = _different(lambda: "".join(draw.choices(_LETTERS, k=4)), len(_LETTERS) ** 4)
        self.people = self._pairs(draw, _FIRST, _LAST, " ")
        self.keys = self._pairs(draw, _FIRST_OF_KEY, _LAST_OF_KEY, "-")

    @staticmethod
    def _pairs(draw: random.Random, first: tuple[str, ...], last: tuple[str, ...], joint: str) -> Iterator[str]:
        """Names of two parts; when all are used up, with a third part that counts."""
        names = [one + joint + other for one in first for other in last]
        draw.shuffle(names)
        yield from names
        number = 2
        while True:
            yield from (f"{name}{joint}{number}" for name in names)
            number += 1


def _different(draw: Callable[[], str], most: int) -> Iterator[str]:
    """What `draw` gives, none of it twice."""
    seen: set[str] = set()
    while len(seen) < most:
        one = draw()
        if one not in seen:
            seen.add(one)
            yield one
    raise SoftPromptError(f"length: got one that {most} values cannot fill, accepted is a shorter context")


def make_suite(
    name: str, count_tokens: Callable[[str], int], length: int, *, needles: int = 12, seed: int = 0
) -> Suite:
    """A suite from a seed.

    Args:
        name: one of `MADE`.
        count_tokens: the tokens of a context, such as `lambda text: chat.context_ids(text).shape[1]`.
        length: the most tokens of the context; it is a little shorter.
        needles: number of facts that are asked for, in training or in the test; 2 or more. "needle" has 16.
        seed: the same seed gives the same suite.

    Raises:
        SoftPromptError: an unknown name, or more or fewer needles than there can be, or a length that is too short.
    """
    if name not in MADE:
        raise SoftPromptError(f"suite: got {name!r}, accepted are {', '.join(MADE)}")
    most = len(_THINGS) if name == "needle" else 1000
    if not 2 <= needles <= most:
        raise SoftPromptError(f"needles: got {needles}, accepted with suite={name} is 2 to {most}")
    draw = random.Random(f"{name} {seed}")
    drawn = _Drawn(draw)
    facts = [_FACTS[name](draw, drawn, number) for number in range(needles)]
    hay, joint = (_pair_lines(drawn), "\n") if name == "pairs" else (sentences(draw), " ")
    context = hide([fact.lines for fact in facts], hay, count_tokens, length, draw, joint)
    draw.shuffle(facts)
    trained, tested = facts[: needles // 2], facts[needles // 2 :]
    return Suite(
        name,
        "contains" if name in ("needle", "multikey", "pairs") else "contains_all",
        context,
        tuple(Query(fact.question, references=fact.references) for fact in trained),
        tuple(Query(fact.question, references=fact.references) for fact in tested),
        tuple(fact.subject for fact in tested),
        (("length", length), ("needles", needles), ("seed", seed)),
    )


def _needle(draw: random.Random, drawn: _Drawn, number: int) -> _Fact:
    (thing, word), value = _THINGS[number], next(drawn.numbers)
    line = f"{thing[0].upper()}{thing[1:]} is {value}."
    return _Fact((line,), f"What is {thing}? {_NUMBER_ALONE}", (value,), (word, value))


def _multikey(draw: random.Random, drawn: _Drawn, number: int) -> _Fact:
    name, value = next(drawn.people), next(drawn.numbers)
    question = f"What is the locker code of {name}? {_NUMBER_ALONE}"
    return _Fact((f"The locker code of {name} is {value}.",), question, (value,), (name, value))


def _multivalue(draw: random.Random, drawn: _Drawn, number: int) -> _Fact:
    name, values = next(drawn.people), tuple(next(drawn.numbers) for _ in range(VALUES_OF_A_KEY))
    lines = tuple(f"{name} keeps the key with the number {value}." for value in values)
    question = f"What are the numbers of all keys that {name} keeps? Answer with the numbers alone."
    return _Fact(lines, question, values, (name, *values))


def _variables(draw: random.Random, drawn: _Drawn, number: int) -> _Fact:
    names, value = tuple(next(drawn.variables) for _ in range(VARIABLES_OF_A_CHAIN)), next(drawn.numbers)
    lines = (f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(names)))
    question = f"Which variables have the value {value}, directly or by way of other variables? Answer with the names."
    return _Fact(lines, question, names, (value, *names))


def _pair(draw: random.Random, drawn: _Drawn, number: int) -> _Fact:
    key, value = next(drawn.keys), next(drawn.numbers)
    return _Fact((f"{key}: {value}",), f"What is the value of {key}? {_NUMBER_ALONE}", (value,), (key, value))


def _pair_lines(drawn: _Drawn) -> Iterator[str]:
    while True:
        yield f"{next(drawn.keys)}: {next(drawn.numbers)}"


_FACTS: dict[str, Callable[[random.Random, _Drawn, int], _Fact]] = {
    "needle": _needle,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "variables": _variables,
    "pairs": _pair,
}
