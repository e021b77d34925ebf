"""Dissimilarities of decoded answers: SQuAD's definitions on English, and sense on scripts without blanks."""

from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress.evaluate.dissimilarity import (
    DISSIMILARITIES,
    edit_distance,
    f1_distance,
    load_dissimilarity,
    mean_dissimilarity,
    mismatch,
    normalised,
    normalised_words,
)
from softprompt_kernels.errors import SoftPromptError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, sat.", "cat sat"),
        ("  a  well-known\tplace\n", "wellknown place"),
        ("theatre of Athens an", "theatre of athens"),
        ("$5.00!", "500"),
        ("A", "a"),  # nothing but an article: an option of a multiple-choice question
        ("«Größe» – groß…", "größe groß"),
        ("e\u0301te\u0301", "été"),
        ("東京、日本。", "東京日本"),
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It costs 5 crowns", ["it", "costs", "5", "crowns"]),
        ("東京タワー 333m", ["東", "京", "タ", "ワ", "ー", "333m"]),
        ("น้ำ", ["น้ำ"[:2], "น้ำ"[2:]]),  # the tone mark stays with its consonant
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("한국 사람", ["한국", "사람"]),
    ],
)
def test_words_of_several_scripts(text: str, expected: list[str]) -> None:
    assert normalised_words(text) == expected


def test_the_same_answer_has_no_distance_and_a_foreign_one_the_largest() -> None:
    for name, function in DISSIMILARITIES.items():
        for text in ("The yellow house.", "東京タワー", "สวัสดี", "", "!"):
            assert function(text, text) == 0, name
        assert function("qqq", "xyz") == 1, name
        assert function("", "xyz") == 1, name


def test_f1_distance_counts_repeated_words_as_squad_does() -> None:
    assert f1_distance("the red red house", "red house by the river") == pytest.approx(1 - 2 * 2 / (3 + 4))
    assert f1_distance("東京の塔", "京都の塔") == pytest.approx(1 - 3 / 4)  # as one word a text they would have nothing
    assert f1_distance("Red, house!", "house red") == 0
    assert edit_distance("Red, house!", "house red") > 0.5


def test_edit_distance_is_relative_to_the_longer_text() -> None:
    assert edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert edit_distance("a  b\nc", " a b c ") == 0


def test_mismatch_is_all_or_nothing() -> None:
    assert mismatch("The seven.", "seven") == 0
    assert mismatch("seven", "seven crowns") == 1


def test_a_function_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_measures_of_answers.py").write_text("def by_length(x, y):\n    return float(len(x) != len(y))\n")
    monkeypatch.chdir(tmp_path)
    function = load_dissimilarity("my_measures_of_answers:by_length")
    assert mean_dissimilarity("mine", function, ["ab", "ab"], ["cd", "c"]) == 0.5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("no_colon", "accepted is package.module:function"),
        (":f", "accepted is package.module:function"),
        ("math:", "accepted is package.module:function"),
        ("../x:f", "accepted is package.module:function"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here' .*current folder"),
        ("math:no_such_name", "'math' has no 'no_such_name'"),
        ("math:pi", "math:pi is of type float, accepted is a function of two texts"),
    ],
)
def test_a_name_that_is_no_function_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(SoftPromptError, match=f"dissimilarity: .*{reason}"):
        load_dissimilarity(spec)


def boom(one: str, other: str) -> float:
    raise KeyError("boom")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda one, other: 1.5, "gave 1.5"),
        (lambda one, other: -0.1, "gave -0.1"),
        (lambda one, other: float("nan"), "gave nan"),
        (lambda one, other: "0", "gave '0'"),
        (lambda one, other: None, "gave None"),
        (boom, "raised KeyError"),
    ],
)
def test_what_is_no_number_from_0_to_1_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(SoftPromptError, match=f"dissimilarity: mine {reason}.*'left'.*'right'"):
        mean_dissimilarity("mine", function, ["left"], ["right"])


def test_a_bool_counts_as_a_number() -> None:
    assert mean_dissimilarity("mine", lambda one, other: one != other, ["a", "b"], ["a", "c"]) == 0.5
