"""The last checkpoints of a run: how many stay, under which names, and which one is read where a file is damaged."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from softprompt_kernels.compress.distill import checkpoint
from softprompt_kernels.compress.distill.checkpoint import Checkpoint, Checkpoints
from softprompt_kernels.errors import SoftPromptError

NAMES = ["checkpoint.safetensors", "checkpoint.before-1.safetensors", "checkpoint.before-2.safetensors"]


def at(step: int) -> Checkpoint:
    tensors = {"prompt": torch.full((2, 3), float(step)), "step": torch.tensor(step), "half": torch.ones(3).bfloat16()}
    return Checkpoint(step, tensors, {"note": str(step)})


def steps(folder: Path) -> dict[str, int]:
    """The step of each checkpoint in a folder, by its name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        one = Checkpoints(path, "me").read()
        assert one is not None
        found[path.name] = one.step
    return found


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_stay(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path / NAMES[0], "me", keep)
    assert checkpoints.read() is None
    for step in range(1, 6):
        checkpoints.write(at(step))
    assert steps(tmp_path) == {NAMES[number]: 5 - number for number in range(keep)}
    found = Checkpoints(tmp_path / NAMES[0], "me", keep).read()
    assert found is not None
    assert (found.step, found.notes) == (5, {"note": "5"})
    assert found.tensors.keys() == at(5).tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in at(5).tensors.items())


def test_a_checkpoint_of_the_same_step_replaces_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / NAMES[0], "me", 2)
    for step in (1, 2, 2):
        checkpoints.write(at(step))
    checkpoints.read()
    checkpoints.write(at(2))
    assert steps(tmp_path) == {NAMES[0]: 2, NAMES[1]: 1}


def test_no_other_file_is_touched(tmp_path: Path) -> None:
    others = ["checkpoint-2.safetensors", "checkpoint.before-1", "checkpoint.before-1.safetensors.mine"]
    for name in others:
        (tmp_path / name).write_text(name)
    for name in ("checkpoint", "checkpoint.before", "best"):  # names that begin alike
        checkpoints = Checkpoints(tmp_path / f"{name}.safetensors", name, 2)
        for step in range(4):
            checkpoints.write(at(step))
    for name in ("checkpoint", "checkpoint.before", "best"):
        found = Checkpoints(tmp_path / f"{name}.safetensors", name).read()
        assert found is not None
        assert found.step == 3
    assert all((tmp_path / name).read_text() == name for name in others)
    assert len(list(tmp_path.iterdir())) == len(others) + 6


@pytest.mark.parametrize("damage", ["truncated", "empty", "a changed bit"])
def test_the_one_before_a_damaged_checkpoint_is_read_with_a_message(
    tmp_path: Path, recording_reporter: Any, damage: str
) -> None:
    path, reporter = tmp_path / NAMES[0], recording_reporter()
    checkpoints = Checkpoints(path, "me", 2)
    for step in (1, 2):
        checkpoints.write(at(step))
    content = path.read_bytes()
    changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    path.write_bytes({"truncated": content[:-5], "empty": b""}.get(damage, changed))
    again = Checkpoints(path, "me", 2, reporter)
    found = again.read()
    assert found is not None
    assert found.step == 1
    assert len(reporter.messages) == 1
    assert f"Warning: {path} is damaged" in reporter.messages[0]
    assert NAMES[1] in reporter.messages[0]
    again.write(at(2))
    assert steps(tmp_path) == {NAMES[0]: 2, NAMES[1]: 1}, "the damaged one is replaced, not kept"
    again.write(at(3))
    assert steps(tmp_path) == {NAMES[0]: 3, NAMES[1]: 2}


def test_checkpoints_that_are_all_damaged_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / NAMES[0], "me", 2)
    for step in (1, 2):
        checkpoints.write(at(step))
    for name in NAMES[:2]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SoftPromptError, match=r"checkpoint.safetensors cannot be read .*; delete it to start over"):
        checkpoints.read()


def test_a_checkpoint_of_another_run_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    Checkpoints(tmp_path / NAMES[1], "me").write(at(1))
    Checkpoints(tmp_path / NAMES[0], "you").write(at(2))
    with pytest.raises(SoftPromptError, match="belongs to another run"):
        Checkpoints(tmp_path / NAMES[0], "me", 2).read()


def test_a_kill_between_two_renames_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / NAMES[0], "me", 3)
    for step in (1, 2, 3):
        checkpoints.write(at(step))
    (tmp_path / NAMES[0]).unlink()
    again = Checkpoints(tmp_path / NAMES[0], "me", 3)
    found = again.read()
    assert found is not None
    assert found.step == 2
    again.write(at(3))
    assert steps(tmp_path) == {NAMES[0]: 3, NAMES[1]: 2, NAMES[2]: 1}


def test_fewer_are_kept_from_the_next_one_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / NAMES[0], "me", 3)
    for step in (1, 2, 3):
        checkpoints.write(at(step))
    fewer = Checkpoints(tmp_path / NAMES[0], "me")
    fewer.read()
    fewer.write(at(4))
    assert steps(tmp_path) == {NAMES[0]: 4}


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / NAMES[0], "me", 2)
    checkpoints.write(at(1))

    def fail(*_: Any) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr(checkpoint, "save_file", fail)
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoints.write(at(2))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / NAMES[0]))
    text = "another error"
    with pytest.raises(SafetensorError, match=text):
        checkpoints.write(at(2))
    assert steps(tmp_path) == {NAMES[0]: 1}


def test_a_checkpoint_of_the_version_before_is_read(tmp_path: Path) -> None:
    save_file(at(3).tensors, tmp_path / NAMES[0], {"step": "3", "identity": "me"})
    found = Checkpoints(tmp_path / NAMES[0], "me").read()
    assert found is not None
    assert (found.step, found.notes) == (3, {})
