"""Many contexts from a folder or a file of JSON Lines: names, own queries, and broken ones among others."""

import json
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress.sources.contexts import Contexts, holds_many, read_contexts
from softprompt_kernels.errors import SoftPromptError


def lines(tmp_path: Path, *records: Any) -> Contexts:
    file = tmp_path / "contexts.jsonl"
    text = "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    file.write_text(text, encoding="utf-8")
    return read_contexts(file)


def folder(tmp_path: Path, **files: bytes) -> Contexts:
    for name, content in files.items():
        path = tmp_path / "texts" / name.replace("__", "/").replace("_txt", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return read_contexts(tmp_path / "texts")


def test_a_folder_gives_a_context_for_each_file_by_its_path(tmp_path: Path) -> None:
    found = folder(tmp_path, b_txt=b"two", a__b_txt=b"\xef\xbb\xbfone\r\n", c=b"three")
    assert [(one.name, one.text) for one in found.contexts] == [("a-b", "one\n"), ("b", "two"), ("c", "three")]
    assert not found.skipped


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "texts" / ".git").mkdir(parents=True)
    (tmp_path / "texts" / ".git" / "head").write_text("no")
    (tmp_path / "texts" / ".hidden").write_text("no")
    assert [one.name for one in folder(tmp_path, a_txt=b"one").contexts] == ["a"]


def test_names_of_a_folder_are_unique_and_stay_when_files_are_added(tmp_path: Path) -> None:
    before = folder(tmp_path, a__b_txt=b"one").contexts[0].name
    names = [one.name for one in folder(tmp_path, **{"a-b_txt": b"two", "z_txt": b"three"}).contexts]
    assert names[0] == before or before in names
    assert len({name.casefold() for name in names}) == 3


def test_broken_files_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    found = folder(tmp_path, a_txt=b"one", empty_txt=b" \n", image=bytes(range(128, 255)))
    assert [one.name for one in found.contexts] == ["a"]
    assert "empty.txt is empty" in found.skipped["empty"]
    assert "not UTF-8" in found.skipped["image"]


def test_a_line_has_text_and_its_own_queries(tmp_path: Path) -> None:
    record = {"name": "Chapter 1/2", "text": "one", "queries": [{"input": "who?", "output": "me"}]}
    named, unnamed = lines(tmp_path, record, "", {"context": "two", "test": [{"input": "what?"}]}).contexts
    assert (named.name, named.text, named.heldout) == ("Chapter-1-2", "one", None)
    assert named.queries is not None and (named.queries[0].input, named.queries[0].output) == ("who?", "me")
    assert (unnamed.name, unnamed.text, unnamed.queries) == ("line-3", "two", None)
    assert unnamed.test is not None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"line 2 is not JSON"),
        ([1], r"line 2 is of type list"),
        ({"name": "b"}, r'line 2 needs a "text"'),
        ({"text": " "}, r"line 2 is empty"),
        ({"text": "b", "context": "c"}, r"line 2 has both"),
        ({"text": "b", "querys": []}, r'line 2 has the unknown key "querys"'),
        ({"text": "b", "queries": []}, r"line 2, queries is not a list of queries"),
        ({"text": "b", "test": [{"output": "x"}]}, r'line 2, test 1 needs an "input"'),
        ({"text": "b", "name": ".."}, r'line 2 has a "name" that is empty'),
        ({"text": "b", "name": "A"}, r"line 2 has the name 'A' of line 1"),
        ('{"text": "\\ud800"}', r"line 2 has half of a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, record: Any, message: str) -> None:
    found = lines(tmp_path, {"name": "a", "text": "one"}, record, {"name": "c", "text": "three"})
    assert [one.name for one in found.contexts] == ["a", "c"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(*found.skipped.values())


@pytest.mark.parametrize("letter", ["x", "\u4e2d", "\U0001d56c"])
def test_long_names_fit_a_file_name_and_stay_different(tmp_path: Path, letter: str) -> None:
    given = [{"name": letter * 300 + end, "text": "one"} for end in ("", "a", "b")]
    names = [one.name for one in lines(tmp_path, *given).contexts]
    assert len(set(names)) == 3 and all(len(name.encode()) < 100 for name in names)
    assert names[1:] == [one.name for one in lines(tmp_path, *given[1:]).contexts], "they do not depend on each other"


def test_a_skipped_line_does_not_take_the_name_of_another(tmp_path: Path) -> None:
    found = lines(tmp_path, {"name": "line-2", "text": "one"}, "{", "{", {"name": "line-3", "text": "two"})
    assert [one.name for one in found.contexts] == ["line-2"]
    assert [*found.skipped] == ["contexts.jsonl, line 2", "line-3", "line-4"]


def test_no_context_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match=r"holds no context that can be used; line-1: .* is not JSON"):
        lines(tmp_path, "{")
    (tmp_path / "none").mkdir()
    with pytest.raises(SoftPromptError, match="accepted are text files in a folder"):
        read_contexts(tmp_path / "none")
    with pytest.raises(SoftPromptError, match="cannot be read"):
        read_contexts(tmp_path / "missing.jsonl")


def test_folders_and_json_lines_hold_many(tmp_path: Path) -> None:
    assert holds_many(tmp_path) and holds_many(Path("a.JSONL"))
    assert not holds_many(Path("a.txt"))
