"""Accuracy against references, by the definitions of the benchmarks."""

import sys

import pytest

from softprompt_kernels.compress.evaluate.accuracy import accuracy, check_metric
from softprompt_kernels.errors import SoftPromptError


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("exact_match", "The Seven.", ["7", "seven"], 1),
        ("exact_match", "It is seven.", ["7", "seven"], 0),
        ("f1", "Ada Brook owns it", ["Ada Brook", "nobody"], 2 * 2 / 6),
        ("f1", "Yes, it does", ["Yes"], 0.5),
        ("f1", "Unanswerable.", ["Unanswerable"], 1),
        ("contains", "It is 17 crowns.", ["7", "17"], 1),
        ("contains", "It is 17 crowns.", ["7", "1"], 0),  # not inside a number
        ("contains", "The code is 12,345.", ["12345"], 1),
        ("contains", "Vale, Mira", ["Mira Vale"], 0),  # the words in their order
        ("contains", "我住在東京都", ["東京"], 1),
        ("contains", "The seventeen", ["seven"], 0),
        ("contains", "a ? b", ["?"], 1),  # a reference of punctuation alone
        ("contains", "b", ["?"], 0),
        ("contains_all", "Codes: 123 and 789.", ["123", "456", "789"], 2 / 3),
        ("choice", "The correct answer is B: a rash", ["B", "a rash"], 1),
        ("choice", "The correct answer is C: a rash", ["B", "a rash"], 0),
        ("choice", "B", ["B", "a rash"], 1),
        ("choice", "(B) something", ["B", "a rash"], 1),
        ("choice", "B. A rash", ["B", "a rash"], 1),
        ("choice", "Answer: option B", ["B", "a rash"], 1),
        ("choice", "Answer: B", ["B", "a rash"], 1),
        ("choice", "Option B, a fever", ["B", "a rash"], 1),
        ("choice", "**B**", ["B", "a rash"], 1),
        ("choice", "A patient with a rash was seen.", ["B", "a rash"], 1),  # no letter, but the text
        ("choice", "A patient was seen.", ["A", "a cough"], 0),  # the article is no letter
        ("choice", "I'd say fever", ["B", "a rash"], 0),
    ],
)
def test_one_answer(metric: str, answer: str, references: list[str], expected: float) -> None:
    assert accuracy(metric, [answer], [references]) == pytest.approx(expected)


def test_the_accuracy_of_a_set_is_the_mean() -> None:
    assert accuracy("contains", ["seven", "eight", "nine"], [["seven"], ["seven"], ["nine"]]) == pytest.approx(2 / 3)


def test_chrf_is_that_of_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    answers, references = ["the red house", "a cat"], [["the red house"], ["one dog", "a cat sat"]]
    assert accuracy("chrf", answers[:1], references[:1]) == 1
    best = sacrebleu.corpus_chrf(answers, [["the red house", "a cat sat"]]).score / 100
    assert 0 < best < 1 and accuracy("chrf", answers, references) == pytest.approx(best)
    assert accuracy("chrf", ["xyz", "q"], references) == 0


def test_a_missing_sacrebleu_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        SoftPromptError, match=r'chrF needs the package sacrebleu: pip install --editable ".\[suites\]"'
    ):
        check_metric("chrf")
    check_metric("f1")
