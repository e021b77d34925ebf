"""Queries from files: an invalid line is named by its number, and no question is in both sets of a split."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from softprompt_kernels.compress.sources.queries import (
    Query,
    hold_out,
    load_queries,
    remove_held_out,
    save_queries,
    write_text,
)
from softprompt_kernels.errors import SoftPromptError


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", r"is not JSON \(.* at column 2\)"),
        ('["a"]', 'is of type list, accepted is an object with "input"'),
        ('"a"', "is of type str"),
        ("3", "is of type int"),
        ('{"output": "a"}', 'needs an "input"'),
        ('{"input": ""}', 'needs an "input"'),
        ('{"input": " \\n"}', 'needs an "input"'),
        ('{"input": 3}', 'needs an "input"'),
        ('{"input": null}', 'needs an "input"'),
        ('{"input": "a", "output": " "}', 'has an "output" that is empty or not text'),
        ('{"input": "a", "output": ["b"]}', 'has an "output" that is empty or not text'),
        ('{"input": "a", "family": ""}', 'has a "family" that is empty or not text'),
        ('{"input": "a", "family": 3}', 'has a "family" that is empty or not text'),
        (
            '{"input": "a", "answer": "b"}',
            'has the unknown key "answer", accepted are "input", "output", "family" and "references"',
        ),
        ('{"input": "a", "references": []}', 'has "references" that are not text or a list of texts'),
        ('{"input": "a", "references": ""}', 'has "references" that'),
        ('{"input": "a", "references": ["b", " "]}', 'has "references" that'),
        ('{"input": "a", "references": ["b", 3]}', 'has "references" that'),
        ('{"input": "a", "references": {"b": 1}}', 'has "references" that'),
        ('{"input": "a", "references": ["\\ud800"]}', "has half of a surrogate pair"),
        ('{"input": "a\\ud800"}', "has half of a surrogate pair"),
        ('{"input": "a", "output": "\\udc00"}', "has half of a surrogate pair"),
        ("[" * 100_000, "cannot be read as JSON|is not JSON"),
        ('{"input": ' + "1" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(f'{{"input": "first"}}\n\n{line}\n{{"input": "last"}}\n')
    with pytest.raises(SoftPromptError, match=rf"queries\.jsonl, line 3 ({reason})"):
        load_queries(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_queries_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(content)
    with pytest.raises(SoftPromptError, match="holds no query"):
        load_queries(path)


def test_other_encodings_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_bytes('{"input": "Größe?"}'.encode("latin-1"))
    with pytest.raises(SoftPromptError, match=r"queries: .* is not UTF-8 text \(byte 13\)"):
        load_queries(path)
    for unreadable in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(SoftPromptError, match=r"queries: .* cannot be read"):
            load_queries(unreadable)


def test_saved_queries_are_read_back(tmp_path: Path) -> None:
    odd = 'a\u2028b\x85c\nd\re"f\\ \x0b g\u00fc\U0001f600'
    train, heldout = [Query("one"), Query("two", odd), Query(odd, "x", "phrase")], [Query("three", "y", "a kind")]
    path = tmp_path / "queries.jsonl"
    save_queries(path, {"train": train, "heldout": heldout})
    assert load_queries(path) == [*train, *heldout]
    assert [path.read_text(encoding="utf-8").count(f'"split": "{part}"') for part in ("train", "heldout")] == [3, 1]


def test_references_are_one_text_or_several_and_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"input": "a", "references": "b"}\n{"input": "c", "output": "d", "references": ["e", "f"]}\n')
    queries = load_queries(path)
    assert [query.references for query in queries] == [("b",), ("e", "f")]
    save_queries(path, {"test": [*queries, Query("g")]})
    assert load_queries(path) == [*queries, Query("g")]
    assert "references" not in path.read_text().splitlines()[2]


def test_blanks_around_a_question_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"input": "What?"}\r\n{"input": " What?\\n"}\r\n{"input": "Who?"}')
    assert [query.input for query in load_queries(path)] == ["What?", "What?", "Who?"]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hold_out_never_splits_an_input(share: float, seed: int) -> None:
    queries = [Query(f"question {index % 7}", f"answer {index}") for index in range(30)]
    train, heldout = hold_out(queries, share, seed)
    inputs = [{query.input for query in part} for part in (train, heldout)]
    assert not inputs[0] & inputs[1]
    assert len(inputs[1]) == min(max(1, round(share * 7)), 6)
    assert sorted([*train, *heldout], key=queries.index) == queries
    assert (train, heldout) == hold_out(queries, share, seed)


def test_hold_out_depends_on_the_seed() -> None:
    queries = [Query(f"question {index}") for index in range(20)]
    assert hold_out(queries, 0.2, 0)[1] != hold_out(queries, 0.2, 1)[1]


@pytest.mark.parametrize("queries", [[], [Query("one")], [Query("one", "a"), Query("one", "b")]])
def test_hold_out_needs_two_inputs(queries: list[Query]) -> None:
    with pytest.raises(SoftPromptError, match="accepted are two or more"):
        hold_out(queries, 0.5, 0)


def test_remove_held_out_drops_every_query_of_a_held_out_input() -> None:
    queries = [Query("one", "a"), Query("two"), Query("one"), Query("three")]
    assert remove_held_out(queries, [Query("one", "z"), Query("four")]) == [Query("two"), Query("three")]
    assert remove_held_out(queries, []) == queries


def test_a_full_disk_keeps_the_previous_file(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with full_disk(), pytest.raises(OSError):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_question_of_several_lines_keeps_its_indentation(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"input": "\\n    def f():\\n        pass\\n"}')
    assert load_queries(path)[0].input == "    def f():\n        pass"
