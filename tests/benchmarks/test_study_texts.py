"""The texts and questions of the study: they can be loaded, the sets of one text are apart, and the README is right."""

import re
from itertools import groupby
from pathlib import Path

import pytest

from softprompt_kernels.compress.sources.queries import load_queries

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "benchmarks/study/texts/README.md").read_text(encoding="utf-8")

# (file of questions, text, stated number), one for each row of the README's second table.
ROWS = [
    (file, text, int(number))
    for file, text, number in re.findall(r"^\| `(\S+\.jsonl)` \| [a-z ]+ \| `(\S+)` \| (\d+) \|$", README, re.MULTILINE)
]
SETS = {text: [file for file, _, _ in rows] for text, rows in groupby(ROWS, key=lambda row: row[1])}


def same_words(question: str) -> str:
    """The question without case, punctuation and repeated blanks."""
    return " ".join(re.findall(r"\w+", question.casefold()))


def test_the_readme_lists_every_file() -> None:
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("demo", "benchmarks/study/texts")
        for path in (REPOSITORY / folder).glob("*.jsonl")
    }
    assert {file for file, _, _ in ROWS} == found
    texts = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "benchmarks/study/texts").glob("*.txt")}
    assert set(SETS) == {"LICENSE", "demo/handbook.txt"} | texts


@pytest.mark.parametrize(("file", "number"), [(file, number) for file, _, number in ROWS])
def test_a_file_holds_as_many_questions_as_stated(file: str, number: int) -> None:
    queries = load_queries(REPOSITORY / file)
    assert len(queries) == number
    assert all(query.output is None for query in queries)  # the teacher answers


@pytest.mark.parametrize("text", SETS)
def test_no_question_is_asked_twice_about_a_text(text: str) -> None:
    questions = [(same_words(query.input), file) for file in SETS[text] for query in load_queries(REPOSITORY / file)]
    first = {}
    for question, file in questions:
        assert question not in first, f"{question!r} is in {first[question]} and in {file}"
        first[question] = file


@pytest.mark.parametrize("text", [text for text in SETS if text != "LICENSE"])
def test_no_paragraph_is_repeated(text: str) -> None:
    paragraphs = [line for line in (REPOSITORY / text).read_text(encoding="utf-8").splitlines() if line]
    assert len(set(paragraphs)) == len(paragraphs)
