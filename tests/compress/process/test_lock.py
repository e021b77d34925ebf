"""Two runs cannot work in one folder at once, and a process that ended blocks nothing."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.process import lock as module
from softprompt_kernels.compress.process.lock import LOCK, check_unlocked, locked
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]
HOLD = """
import sys, time
from pathlib import Path
from softprompt_kernels.compress.process.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

pytestmark = [
    pytest.mark.usefixtures("no_plot"),
    pytest.mark.skipif(module.fcntl is None, reason="this system has no locks of POSIX"),
]


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder, and is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_in_the_folder_is_refused_at_once_and_names_the_process(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=1)
    with holder(config.output) as process, monkeypatch.context() as patch:
        patch.setattr("softprompt_kernels.compress.run.load_inputs", None)  # nothing is loaded
        with pytest.raises(SoftPromptError, match=f"output: .*run is in use by process {process.pid} on "):
            compress(config)
        assert [entry.name for entry in config.output.iterdir()] == [LOCK]
    assert (config.output / LOCK).exists(), "it was killed"
    compress(config)
    assert not (config.output / LOCK).exists()


def test_a_run_that_loads_its_model_at_the_same_time_is_refused_before_it_writes(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=1)
    monkeypatch.setattr("softprompt_kernels.compress.run.check_unlocked", lambda _: None)
    with locked(config.output):
        with pytest.raises(SoftPromptError, match="is in use by process"):
            compress(config)
        assert [entry.name for entry in config.output.iterdir()] == [LOCK]


def test_the_lock_ends_with_an_error_and_with_ctrl_c(make_config: Make, recording_reporter: Any) -> None:
    config = make_config()
    for reporter, error in (
        (recording_reporter("Teacher's answers", 4, SystemError), SystemError),
        (recording_reporter("Training", 3), Interrupted),
    ):
        with pytest.raises(error):
            compress(config, reporter)
        assert not (config.output / LOCK).exists()
    compress(config)


def test_a_folder_is_locked_again_and_again_and_others_are_free(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    for _ in range(2):
        with locked(folder), locked(tmp_path / "b"):
            with pytest.raises(SoftPromptError, match="in use"), locked(folder):
                pass
            with pytest.raises(SoftPromptError, match="in use"):
                check_unlocked(folder)
        check_unlocked(folder)
    assert list(folder.iterdir()) == []


def test_a_lock_whose_file_was_deleted_meanwhile_is_taken_on_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder deletes the file and ends while another process has opened the file, and not locked it yet."""
    flock, waiting = module.fcntl.flock, [True]

    def late(file: int, kind: int) -> None:
        if waiting:
            waiting.clear()
            (tmp_path / LOCK).unlink()
        flock(file, kind)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(SoftPromptError, match="in use"), locked(tmp_path):
        pass


def test_a_file_system_without_locks_and_an_output_that_is_a_file_are_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / "file").write_text("mine")
    with locked(tmp_path / "file"):
        assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        RunFolder(tmp_path / "run").claim({"steps": 1}, "")


def test_a_folder_with_nothing_but_a_lock_belongs_to_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on a machine that stopped")
    RunFolder(tmp_path).claim({"steps": 1}, "")


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command may be looking whether the folder is in use."""
    flock, busy = module.fcntl.flock, [True, True]

    def held(file: int, kind: int) -> None:
        if busy:
            busy.pop()
            raise BlockingIOError
        flock(file, kind)

    monkeypatch.setattr(module.fcntl, "flock", held)
    with locked(tmp_path):
        assert not busy and (tmp_path / module.LOCK).exists()


def test_the_file_of_another_user_is_locked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / module.LOCK).touch()
    opened = os.open

    def only_readable(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError
        return opened(path, flags, *mode)

    monkeypatch.setattr(module.os, "open", only_readable)
    with locked(tmp_path), pytest.raises(SoftPromptError, match="is in use by"):
        check_unlocked(tmp_path)
