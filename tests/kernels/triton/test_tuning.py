"""Tuning, with a simulated clock: the fastest candidate is chosen, kept in the file, and tuned again when outdated."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from softprompt_kernels.kernels.triton import tuning

CUDA = torch.device("cuda", 0)


class Config(NamedTuple):
    rows: int
    milliseconds: float


FAST, SLOW, BROKEN = Config(64, 1.0), Config(128, 2.0), Config(256, -1.0)


class Launch:
    """Takes the milliseconds that its configuration says."""

    def __init__(self, config: Config, device: "Device") -> None:
        self.config, self.device = config, device

    def run(self) -> None:
        if self.config.milliseconds < 0:
            raise RuntimeError("out of resource: shared memory")
        self.device.now += self.config.milliseconds


class Device:
    """A GPU whose clock advances with every launch."""

    now = 0.0
    timed = 0

    def milliseconds(self, run: Callable[[], None]) -> float:
        self.timed += 1
        before = self.now
        run()
        return self.now - before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    """Tuning is on, for a device that does not exist, with its file in a new folder."""
    monkeypatch.setenv("SOFTPROMPT_TRITON_TUNE", "1")
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "Some GPU 100")
    monkeypatch.setattr(tuning, "run_all", lambda launches, device: [launch.run() for launch in launches])
    return Device()


@pytest.fixture
def choose(device: Device) -> Callable[..., Config]:
    def chosen(*candidates: Config, key: str = "bf16 64x128", forget: bool = True, **options: Any) -> Config:
        if forget:  # like a new process
            tuning._chosen.clear()
        where = options.pop("device", CUDA)
        return tuning.choose(
            "forward", key, candidates, lambda config: [Launch(config, device)], where, timer=device.milliseconds
        )

    return chosen


def test_the_fastest_is_chosen_and_later_processes_do_not_time_again(choose: Any, device: Device) -> None:
    assert choose(SLOW, FAST) == FAST
    assert device.timed == 2
    assert choose(SLOW, FAST) == FAST and choose(SLOW, FAST, forget=False) == FAST
    assert device.timed == 2
    written = json.loads(tuning.cache_file().read_text())
    assert written["version"] == tuning.version() and "triton" in written["version"]
    assert list(written["chosen"]) == ["forward | Some GPU 100 | bf16 64x128"]
    assert [path.name for path in tuning.cache_file().parent.iterdir()] == ["triton-tuning.json"]


def test_each_key_is_tuned_separately_and_all_are_kept(choose: Any, device: Device) -> None:
    choose(SLOW, FAST)
    choose(SLOW, FAST, key="fp16 64x128")
    assert device.timed == 4
    assert len(json.loads(tuning.cache_file().read_text())["chosen"]) == 2


def test_a_changed_list_of_candidates_is_tuned_again(choose: Any, device: Device) -> None:
    choose(SLOW, FAST)
    assert choose(SLOW, FAST, Config(32, 0.5)).rows == 32
    assert device.timed == 5


def test_a_candidate_that_does_not_run_is_skipped(choose: Any) -> None:
    assert choose(BROKEN, SLOW) == SLOW


def test_an_error_is_raised_if_no_candidate_runs(choose: Any) -> None:
    with pytest.raises(RuntimeError, match="none of the 2 configurations of forward"):
        choose(BROKEN, BROKEN._replace(rows=512))


def test_without_tuning_the_shipped_candidate_is_used_and_nothing_is_timed(
    choose: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(SLOW, FAST, device=torch.device("meta")) == SLOW
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(SLOW, FAST) == SLOW
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delenv("SOFTPROMPT_TRITON_TUNE")
    assert choose(SLOW, FAST) == SLOW
    monkeypatch.setenv("SOFTPROMPT_TRITON_TUNE", "1")
    monkeypatch.setattr(tuning, "_capturing", lambda: True)  # a CUDA graph
    assert choose(SLOW, FAST) == SLOW
    assert device.timed == 0 and not tuning.cache_file().exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"version": "',
        "[1, 2]",
        '{"version": "softprompt-kernels 0.0.1", "chosen": {}}',
        '{"chosen": []}',
        b"\xff\xfe\x00",
    ],
)
def test_an_unreadable_or_outdated_file_is_ignored_with_one_warning_and_replaced(
    choose: Any, device: Device, text: str | bytes
) -> None:
    tuning._warned.clear()
    file = tuning.cache_file()
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="tuned again") as seen:
        assert choose(SLOW, FAST) == FAST
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(SLOW, FAST) == FAST
    assert device.timed == 2


def test_an_entry_with_an_invalid_candidate_is_tuned_again(choose: Any, device: Device) -> None:
    choose(SLOW, FAST)
    file = tuning.cache_file()
    file.write_text(file.read_text().replace('"candidate": 1', '"candidate": 7'))
    assert choose(SLOW, FAST) == FAST
    assert device.timed == 4


def test_a_folder_that_cannot_be_written_gives_one_warning(
    choose: Any, device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuning._warned.clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be"):
        assert choose(SLOW, FAST) == FAST
    assert choose(SLOW, FAST, forget=False) == FAST
    assert device.timed == 2


def test_a_shape_class_rounds_sizes_up_to_powers_of_2() -> None:
    assert tuning.shape_class(1, 100, 128, 129) == "1x128x128x256"
