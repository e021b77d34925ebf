"""A folder is replaced completely or not at all, also after failures, interrupts and a stop of the machine."""

import os
from pathlib import Path

import pytest

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import atomic_folder as folder

OLD = {"mark": b"old", "data": b"1"}
NEW = {"mark": b"new", "data": b"2"}


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder.replace_folder(tmp_path / "a" / "b", NEW, "mark")
    assert content(tmp_path / "a" / "b") == NEW


def test_an_empty_folder_is_filled_and_a_saved_one_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for files in (OLD, NEW):
        folder.replace_folder(target, files, "mark")
        assert content(target) == files
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder.replace_folder(tmp_path / "link", NEW, "mark")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == NEW


@pytest.mark.parametrize("found", [["data"], ["notes.txt"], ["mark", "README.md"], ["mark", "sub/x"]])
def test_a_folder_with_other_files_is_refused_and_names_them(found: list[str], tmp_path: Path) -> None:
    for name in found:
        (tmp_path / "target" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "target" / name).write_text("mine")
    with pytest.raises(SoftPromptError, match=found[-1].split("/")[0]):
        folder.replace_folder(tmp_path / "target", NEW, "mark")
    assert all((tmp_path / "target" / name).read_text() == "mine" for name in found)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(SoftPromptError, match="is a file"):
        folder.replace_folder(tmp_path / "target", NEW, "mark")
    with pytest.raises(SoftPromptError, match="could not be written"):
        folder.replace_folder(tmp_path / "target" / "below", NEW, "mark")


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for act in (lambda path: folder.replace_folder(path, NEW, "mark"), folder.recover):
        with pytest.raises(SoftPromptError, match="cannot be read"):
            act(tmp_path / ("x" * 300))
    with pytest.raises(SoftPromptError, match="cannot be read"):
        folder.check_replaceable(tmp_path / ("x" * 300), NEW, "mark")


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_rename_restores_the_old_folder(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.replace_folder(tmp_path / "target", OLD, "mark")
    rename, calls = os.rename, []

    def fail(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing_call:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(SoftPromptError, match="unchanged"):
        folder.replace_folder(tmp_path / "target", NEW, "mark")
    assert content(tmp_path / "target") == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_an_interrupt_keeps_the_old_folder_and_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.replace_folder(tmp_path / "target", OLD, "mark")

    def interrupted(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.replace_folder(tmp_path / "target", NEW, "mark")
    assert content(tmp_path / "target") == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_recover_restores_the_folder_after_a_stop_between_the_renames(tmp_path: Path) -> None:
    folder.replace_folder(tmp_path / "target", OLD, "mark")
    os.rename(tmp_path / "target", tmp_path / ".target.previous")
    folder.recover(tmp_path / "target")
    assert content(tmp_path / "target") == OLD
    # `recover` does not touch a good folder when an old `.previous` is next to it.
    folder.replace_folder(tmp_path / ".target.previous", OLD, "mark")
    folder.replace_folder(tmp_path / "target", NEW, "mark")
    folder.recover(tmp_path / "target")
    assert content(tmp_path / "target") == NEW
