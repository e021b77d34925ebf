"""A run followed in TensorBoard and, offline, in W&B: what is logged, continued, refused before any work, survived."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.tracking import service as service_module
from softprompt_kernels.compress.tracking import tracker as tracker_module
from softprompt_kernels.compress.tracking.service import check_service
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]
pytestmark = pytest.mark.usefixtures("no_plot")


class Recorder:
    """A service that keeps what it gets. Raises at the call `failing`."""

    def __init__(self, failing: int = -1) -> None:
        self.steps: list[tuple[str, int, dict[str, float]]] = []
        self.final: dict[str, float] = {}
        self.closed: list[bool] = []
        self.tracks: list[str] = []
        self.left = failing

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError("the network is down")
        self.steps.append((stage, step, dict(figures)))

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self.final = dict(figures)

    def close(self, finished: bool) -> None:
        self.closed.append(finished)

    def open(self, config: CompressConfig, folder: RunFolder, track: str) -> "Recorder":
        self.tracks.append(track)
        return self


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    def make(**options: Any) -> Recorder:
        recorder = Recorder(**options)
        monkeypatch.setattr(tracker_module, "open_service", recorder.open)
        return recorder

    return make


def logged(config: CompressConfig) -> list[tuple[str, int]]:
    return [
        *(("matching from layer 0", step + 1) for step in range(config.matching_steps)),
        *(("training", step + 1) for step in range(config.steps)),
    ]


def test_tensorboard_has_every_step_and_the_final_figures(make_config: Make) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(track="tensorboard", evaluate_every=2, matching_steps=3)
    figures = compress(config)
    events = event_accumulator.EventAccumulator(str(config.output / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    for stage, name, key in (
        ("training", "training/loss", "loss"),
        ("training", "training/heldout_kl", "heldout_kl"),
        ("matching", "matching from layer 0/error", "error"),
    ):
        expected = [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in records if r["stage"] == stage and key in r]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    (final,) = events.Scalars("evaluation/heldout/recovered")
    assert (final.step, final.value) == (config.steps, pytest.approx(figures["heldout"]["recovered"], rel=1e-5))
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """W&B without a network and without a login."""
    for name, value in {"WANDB_MODE": "offline", "NETRC": str(tmp_path / "netrc"), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # settings of an earlier test
    yield wandb
    wandb.teardown()


def records_of(file: Path) -> Iterator[Any]:
    """The records of an offline run: the log format of LevelDB, with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, kept = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        kept += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            record = Record()
            record.ParseFromString(kept)
            yield record
            kept = b""


def test_wandb_offline_has_every_step_and_the_final_figures(make_config: Make, offline: Any) -> None:
    config = make_config(track="wandb", matching_steps=3)
    figures = compress(config)
    (file,) = config.output.glob("wandb/offline-run-*/*.wandb")
    assert json.loads((config.output / "tracking.json").read_text())["wandb"]["id"] in file.name
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for record in records_of(file):
        if record.HasField("history"):
            found = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found})
        for item in record.summary.update if record.HasField("summary") else ():
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    steps = [
        (stage, row[f"{stage}/step"])
        for row in history
        for stage in ("matching from layer 0", "training")
        if f"{stage}/step" in row
    ]
    assert steps == logged(config)
    losses = [json.loads(line).get("loss") for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("training/loss") for row in history] == losses
    assert summary["evaluation/heldout/recovered"] == figures["heldout"]["recovered"]


def test_a_resumed_run_continues_the_track(
    make_config: Make, recording_reporter: Any, recorder: Callable[..., Recorder]
) -> None:
    service, config = recorder(), make_config(track="tensorboard", checkpoint_every=100)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    (config.output / "checkpoint.safetensors").unlink()  # as if it had been killed: it repeats its steps
    figures = compress(config)
    assert service.closed == [False, True]
    assert len(set(service.tracks)) == 1
    assert [(stage, step) for stage, step, _ in service.steps] == logged(config), "each step once, in order"
    assert service.final["heldout/kl_prompt"] == figures["heldout"]["kl_prompt"]
    compress(config)
    assert len(service.tracks) == 2, "a finished run is not followed"


def test_a_run_that_is_followed_later_is_logged_from_its_beginning(
    make_config: Make, recording_reporter: Any, recorder: Callable[..., Recorder]
) -> None:
    service = recorder()
    with pytest.raises(Interrupted):
        compress(make_config(), recording_reporter("Training", 3))
    config = make_config(track="tensorboard")
    compress(config)
    assert [(stage, step) for stage, step, _ in service.steps] == logged(config)


@pytest.mark.parametrize("failing", [1, 12])
def test_a_service_that_fails_does_not_end_the_run(
    make_config: Make, recording_reporter: Any, recorder: Callable[..., Recorder], failing: int
) -> None:
    service, reporter = recorder(failing=failing), recording_reporter()
    compress(make_config(track="tensorboard"), reporter)
    warnings = [message for message in reporter.messages if message.startswith("Warning")]
    assert warnings == ["Warning: tensorboard failed (the network is down). The run goes on without it."]
    assert len(service.steps) == failing - 1


def test_a_service_that_cannot_be_used_is_refused_before_any_work(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, offline: Any
) -> None:
    config = make_config(track="wandb")
    check_service("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    offline.teardown()
    with pytest.raises(SoftPromptError, match=r"wandb is not logged in; run `wandb login`, or set WANDB_MODE=offline"):
        compress(config)
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    offline.teardown()
    with pytest.raises(SoftPromptError, match="track: wandb cannot be used"):
        compress(config)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SoftPromptError, match="track: tensorboard cannot be imported"):
        check_service("tensorboard")
    monkeypatch.setattr(service_module, "find_spec", lambda name: None)
    with pytest.raises(SoftPromptError, match=r'needs a package that is not installed; pip install --editable ".\[tr'):
        compress(config)
    assert not config.output.exists()
