"""Suites from a seed: the text fits its length, the questions can be answered from it, and no fact is in both sets."""

import random
import re
from collections.abc import Iterator

import pytest

from softprompt_kernels.compress import Suite, make_suite
from softprompt_kernels.compress.evaluate.accuracy import accuracy
from softprompt_kernels.compress.evaluate.suites.haystack import hide
from softprompt_kernels.compress.evaluate.suites.suite import MADE
from softprompt_kernels.errors import SoftPromptError

LENGTH = 400


def count(text: str) -> int:
    return len(text.split())


def suite_of(name: str, **options: int) -> Suite:
    return make_suite(name, count, **({"length": LENGTH, "needles": 8, "seed": 3} | options))


@pytest.mark.parametrize("name", MADE)
def test_the_text_has_the_wanted_length_and_depends_on_the_seed_alone(name: str) -> None:
    suite = suite_of(name)
    assert LENGTH - 12 <= count(suite.context) <= LENGTH
    assert suite_of(name) == suite
    assert suite_of(name, seed=4).context != suite.context
    assert dict(suite.origin) == {"length": LENGTH, "needles": 8, "seed": 3}


@pytest.mark.parametrize("name", MADE)
def test_every_reference_stands_in_the_text_and_no_fact_is_in_both_sets(name: str) -> None:
    suite = suite_of(name)
    assert (len(suite.train), len(suite.test), len(suite.subjects)) == (4, 4, 4)
    references = [one for query in (*suite.train, *suite.test) for one in query.references]
    assert len(set(references)) == len(references)
    for one in references:
        assert len(re.findall(rf"\b{one}\b", suite.context)) >= 1, one
    for query, subject in zip(suite.test, suite.subjects, strict=True):
        assert any(word.lower() in query.input.lower() for word in subject)
        for asked in suite.train:
            assert not any(word.lower() in asked.input.lower() for word in subject), (asked, subject)


@pytest.mark.parametrize("name", MADE)
def test_who_reads_the_text_answers_all_and_who_does_not_answers_none(name: str) -> None:
    suite = suite_of(name)
    references = [query.references for query in suite.test]
    assert accuracy(suite.metric, [answer_from(suite.context, query.input) for query in suite.test], references) == 1
    others = [" ".join(query.references) for query in suite.train]
    assert accuracy(suite.metric, others, references) == 0


def answer_from(text: str, question: str) -> str:
    """The answer to a question of a suite, by rules."""
    if found := re.search(r"have the value (\d+)", question):
        names: list[str] = re.findall(rf"VAR (\w+) = {found[1]}\.", text)
        while following := [b for b, a in re.findall(r"VAR (\w+) = VAR (\w+)\.", text) if a == names[-1]]:
            names += following
        return " ".join(names)
    if found := re.search(r"all keys that (.+) keeps", question):
        return " ".join(re.findall(rf"{found[1]} keeps the key with the number (\d+)", text))
    if found := re.search(r"value of ([\w-]+)\?", question):
        return re.search(rf"^{found[1]}: (\d+)$", text, re.MULTILINE)[1]
    thing = re.match(r"What is (.+)\?", question)[1]
    return re.search(rf"{thing} is (\d+)\.", text, re.IGNORECASE)[1]


def test_facts_are_hidden_at_all_depths_in_their_order() -> None:
    def hay() -> Iterator[str]:
        while True:
            yield "hay"

    facts = [[f"{fact}a", f"{fact}b"] for fact in range(50)]
    words = hide(facts, hay(), count, 2000, random.Random(0)).split()
    assert len(words) == 2000
    places = [words.index(line) for lines in facts for line in lines]
    assert min(places) < 200 and max(places) > 1800
    for first, second in facts:
        assert words.index(first) < words.index(second)


def test_the_largest_text_that_fits_is_found() -> None:
    def hay() -> Iterator[str]:
        while True:
            yield "hay hay hay"

    for length in range(2, 12):
        assert count(hide([["x", "y"]], hay(), count, length, random.Random(1))) == 2 + 3 * ((length - 2) // 3)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("needles", {}, "suite: got 'needles', accepted are needle, multikey"),
        ("needle", {"needles": 17}, "needles: got 17, accepted with suite=needle is 2 to 16"),
        ("pairs", {"needles": 1}, "needles: got 1, accepted with suite=pairs is 2 to 1000"),
        ("needle", {"length": 20}, r"length: got 20 tokens, accepted is at least \d+, which the facts alone take"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, options: dict[str, int], reason: str) -> None:
    with pytest.raises(SoftPromptError, match=reason):
        suite_of(name, **options)


def test_many_facts_have_different_names() -> None:
    for name in ("multikey", "pairs"):
        suite = suite_of(name, needles=400, length=4000)
        assert len({query.input for query in (*suite.train, *suite.test)}) == 400
