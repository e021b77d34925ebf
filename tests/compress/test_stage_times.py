"""The times of the stages: what counts, in which order, and what earlier calls have spent."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from softprompt_kernels.compress import stage_times
from softprompt_kernels.compress.stage_times import StageTimes


@pytest.fixture(autouse=True)
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by one second each time it is read, so that each stage takes one second."""

    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 1

    ticking = clock()
    monkeypatch.setattr(stage_times.time, "perf_counter", lambda: next(ticking))


def run(times: StageTimes, *names: str) -> None:
    for name in names:
        with times(name):
            pass


def test_each_stage_has_its_seconds_in_the_order_of_the_stages() -> None:
    times = StageTimes()
    run(times, "load", "context", "answers", "context")
    assert list(times.seconds.items()) == [("load", 1), ("context", 2), ("answers", 1)]
    assert times.total == 4


def test_a_stage_that_raises_does_not_count(tmp_path: Path) -> None:
    times = StageTimes()
    times.keep_in(tmp_path / "stages.json")
    run(times, "load")
    with pytest.raises(KeyboardInterrupt), times("answers"):
        raise KeyboardInterrupt
    assert times.seconds == json.loads((tmp_path / "stages.json").read_text()) == {"load": 1}


def test_a_later_call_adds_what_earlier_calls_have_spent(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    for call in (1, 2, 3):
        times = StageTimes()
        run(times, "load")
        times.keep_in(file)
        assert json.loads(file.read_text())["load"] == call, "a stage before the file was known is stored too"
        run(times, "answers")
    run(times, "training")
    assert list(times.seconds.items()) == [("load", 3), ("answers", 3), ("training", 1)]
    assert json.loads(file.read_text()) == times.seconds
    assert [entry.name for entry in tmp_path.iterdir()] == ["stages.json"]


def test_what_was_kept_of_an_interrupted_stage_replaces_the_stored_seconds(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    file.write_text('{"load": 2, "training": 100}')
    times = StageTimes()
    times.keep_in(file)
    with times("training"):
        times.replace_earlier("training", 30.5)
    assert times.seconds == json.loads(file.read_text()) == {"load": 2, "training": 31.5}


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"load": "long"}', '{"load": -1}', '{"load": NaN}', '{"load": null}']
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "stages.json"
    file.write_text(content)
    times = StageTimes()
    run(times, "load")
    times.keep_in(file)
    assert times.seconds == json.loads(file.read_text()) == {"load": 1}
