"""Files of LongHealth, QASPER and MTOB, made up in their formats, and files that are of another format."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress.evaluate.accuracy import accuracy
from softprompt_kernels.compress.evaluate.suites.longhealth import read_longhealth
from softprompt_kernels.compress.evaluate.suites.mtob import read_mtob
from softprompt_kernels.compress.evaluate.suites.qasper import read_qasper
from softprompt_kernels.errors import SoftPromptError

OPTIONS = {
    f"answer_{letter}": text for letter, text in zip("abcde", ("one", "two", "three", "four", "five"), strict=True)
}


def patient(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "birthday": "1970-01-02",
        "diagnosis": "Measles",
        "texts": {"text_0": f"{name} has had three visits.", "text_1": "All was well."},
        "questions": [
            {"No": 0, "question": "How many visits?", **OPTIONS, "correct": "three", "answer_location": {}},
            {"No": 1, "question": "How many nurses?", **OPTIONS, "correct": "two"},
        ],
    }


LONGHEALTH = {"patient_01": patient("Anna Sample"), "patient_02": patient("Bert Other")}


def answer(**content: Any) -> dict[str, Any]:
    empty = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": "", "evidence": []}
    return {"answer": empty | content, "annotation_id": "x"}


QASPER = {
    "1909.00001": {
        "title": "On Tea",
        "abstract": "We drink tea.",
        "full_text": [
            {"section_name": "Introduction", "paragraphs": ["Tea is hot.", ""]},
            {"section_name": None, "paragraphs": ["We use green tea."]},
        ],
        "qas": [
            {
                "question": "Which tea?",
                "question_id": "q0",
                "answers": [answer(extractive_spans=["green tea", "hot tea"]), answer(free_form_answer="a green one")],
            },
            {"question": "Is it hot?", "answers": [answer(yes_no=True), answer(yes_no=True), answer(yes_no=False)]},
            {"question": "How much?", "answers": [answer(unanswerable=True)]},
        ],
    },
    "1909.00002": {
        "title": "On Milk",
        "full_text": [{"section_name": "All", "paragraphs": ["Milk."]}],
        "qas": [{"question": "Which tea?", "answers": [answer(free_form_answer="none")]}],
    },
}
MTOB = [
    {"big-bench-canary": "do not train"},
    {"original": "Bal se sor koraru.", "ground_truth": "The dog bit the fish.", "original_id": 3},
    {"original": "Ma he bot.", "ground_truth": "He went already."},
]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any, str], Path]:
    def write(content: Any, name: str = "file.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_longhealth(written: Any) -> None:
    path = written(LONGHEALTH)
    suite = read_longhealth(path, ())
    assert suite.context == (
        "Patient: Anna Sample, 1970-01-02, Measles\n\nAnna Sample has had three visits.\n\nAll was well."
    )
    first = suite.test[0]
    assert first.input.splitlines() == [
        "How many visits?",
        "A: one",
        "B: two",
        "C: three",
        "D: four",
        "E: five",
        "Answer with the letter of the right option.",
    ]
    assert first.references == ("C", "three") and suite.test[1].references == ("B", "two")
    answers = ["The correct answer is C: three.", "three"]
    assert accuracy(suite.metric, answers, [query.references for query in suite.test]) == 0.5
    both = read_longhealth(path, ("patient_01", "patient_02"))
    assert "Bert Other has had three visits." in both.context and both.context.startswith(suite.context)
    assert [query.input.partition("\n")[0] for query in both.test[1:3]] == [
        "About Anna Sample: How many nurses?",
        "About Bert Other: How many visits?",
    ]
    assert (suite.train, suite.subjects) == ((), ())


def test_qasper(written: Any) -> None:
    path = written(QASPER)
    suite = read_qasper(path, ())
    assert suite.context == "On Tea\n\nWe drink tea.\n\nIntroduction\n\nTea is hot.\n\nWe use green tea."
    assert [query.references for query in suite.test] == [
        ("green tea, hot tea", "a green one"),
        ("Yes", "No"),
        ("Unanswerable",),
    ]
    answers = ["green one", "yes", "It is unanswerable"]
    assert accuracy(suite.metric, answers, [query.references for query in suite.test]) == pytest.approx(
        (1 + 1 + 0.5) / 3
    )
    both = read_qasper(path, ("1909.00002", "1909.00001"))
    assert both.context.startswith("On Milk") and len({query.input for query in both.test}) == 4
    assert 'About "On Milk": Which tea?' in both.test[0].input


def test_mtob(written: Any, tmp_path: Path) -> None:
    book = written("A grammar. Bal is dog.", "grammar_book.txt")
    suite = read_mtob(written(MTOB, "test_examples_ke.json"), book)
    assert suite.context == "A grammar. Bal is dog." and suite.metric == "chrf"
    assert [query.references for query in suite.test] == [("The dog bit the fish.",), ("He went already.",)]
    assert suite.test[0].input.startswith("Translate from Kalamang to English: Bal se sor koraru.")
    turned = read_mtob(written(MTOB, "test_examples_ek.json"), book)
    assert "from English to Kalamang" in turned.test[0].input
    with pytest.raises(SoftPromptError, match="does not end in ke or ek"):
        read_mtob(written(MTOB, "broke.json"), book)
    with pytest.raises(SoftPromptError, match=r"context: .*no.txt cannot be read"):
        read_mtob(written(MTOB, "test_examples_ek.json"), tmp_path / "no.txt")
    with pytest.raises(SoftPromptError, match="it has no sentences"):
        read_mtob(written(MTOB[:1], "test_examples_ek.json"), book)


def changed(content: Any, place: str, value: Any) -> Any:
    """A copy with another value at a place such as "a.0.b"; None deletes it."""
    copied = copy.deepcopy(content)
    *parents, last = (int(key) if key.isdigit() else key for key in place.split("/"))
    inner = copied
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copied


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ([], "the whole file is no object"),
        (QASPER, r"1909.00001.texts is no object"),
        (changed(LONGHEALTH, "patient_01/questions", None), r"patient_01.questions is no list"),
        (changed(LONGHEALTH, "patient_01/questions/1/answer_c", None), r"questions\[1\].answer_c is no text"),
        (
            changed(LONGHEALTH, "patient_01/questions/1/correct", "six"),
            r"questions\[1\].correct is none of its answers",
        ),
        (changed(LONGHEALTH, "patient_01/texts/text_1", 3), r"patient_01.texts.text_1 is no text"),
        (changed(LONGHEALTH, "patient_01/texts/text_1", "\ud800"), r"text_1 has half of a surrogate pair"),
    ],
    ids=range(9),
)
def test_another_format_than_that_of_longhealth_is_refused(written: Any, content: Any, reason: str) -> None:
    with pytest.raises(
        SoftPromptError, match=f"file.json is no file of LongHealth: .*{reason}.*; accepted is benchmark"
    ):
        read_longhealth(written(content), ())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LONGHEALTH, "patient_01.title is no text"),
        (changed(QASPER, "1909.00001/full_text", None), "full_text is no list"),
        (
            changed(QASPER, "1909.00001/full_text/0/paragraphs", "text"),
            r"full_text\[0\].paragraphs is no list of texts",
        ),
        (changed(QASPER, "1909.00001/full_text/0/paragraphs/0", 3), r"full_text\[0\].paragraphs is no text"),
        (changed(QASPER, "1909.00001/qas/2/answers/0/answer/unanswerable", False), r"answers\[0\].answer is no text"),
        (changed(QASPER, "1909.00001/qas/2/answers", []), r"qas\[2\].answers is no list"),
        (changed(QASPER, "1909.00001/qas/0/answers/0/answer/extractive_spans", "tea"), "extractive_spans is no list"),
        (changed(QASPER, "1909.00001/qas/0/answers/1/answer/free_form_answer", {"a": 1}), "answer is no text"),
        (changed(QASPER, "1909.00001/qas/1/answers/0/answer/yes_no", [1]), "answer is no text"),
    ],
    ids=range(9),
)
def test_another_format_than_that_of_qasper_is_refused(written: Any, content: Any, reason: str) -> None:
    with pytest.raises(SoftPromptError, match=f"file.json is no file of QASPER: .*{reason}"):
        read_qasper(written(content), ())


def test_another_format_than_that_of_mtob_is_refused(written: Any) -> None:
    book = written("text", "book.txt")
    for content, reason in ((QASPER, "no list"), ([3], r"\[0\] is no object"), ([{"original": "a"}], "ground_truth")):
        with pytest.raises(SoftPromptError, match=f"ke.json is no file of MTOB: .*{reason}"):
            read_mtob(written(content, "ke.json"), book)


def test_an_item_that_is_not_there_and_a_file_that_is_not_there(written: Any, tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match=r"item: got 'patient_09', accepted in .* are patient_01, patient_02$"):
        read_longhealth(written(LONGHEALTH), ("patient_01", "patient_09"))
    with pytest.raises(SoftPromptError, match=r"^file: \S*no.json cannot be read"):
        read_qasper(tmp_path / "no.json", ())
