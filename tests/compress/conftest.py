"""A tiny model in memory, a text for it, examples as token ids, and small configurations."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress import CompressConfig, SilentReporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import watch
from softprompt_kernels.compress.teacher.moments_cache import Targets, TargetWriter, read_targets
from softprompt_kernels.compress.teacher.recording import Recording
from softprompt_kernels.models import Head, capture, head_of
from softprompt_kernels.prompts import Prefix

TEXT = "Mira Vale keeps the blue mill. It grinds 40 sacks a day. The river Osk turns it. Visitors pay 3 crowns."
INPUTS = ("Who keeps it?", "What turns it?", "How many sacks?", "What do visitors pay?", "Which colour?", "Where?")


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Seven examples of different lengths. Two of them have outputs of one token."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 4), (1, 1), (6, 2), (2, 7), (5, 5), (4, 1), (3, 3)]

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 250, (count,), generator=generator).tolist())

    return [Example(draw(m), draw(n)) for m, n in shapes]


@pytest.fixture(scope="session")
def context(model: PreTrainedModel) -> Prefix:
    """A captured context of 20 tokens."""
    return capture(model, torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(6)))


@pytest.fixture
def make_config(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., CompressConfig]:
    """`make_config(steps=2)`: a short run with text and six queries in `tmp_path`; options override its settings."""
    (tmp_path / "context.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"input": i}) + "\n" for i in INPUTS), encoding="utf-8")

    def make(**options: Any) -> CompressConfig:
        settings = {
            "model": str(tiny_model_folder),
            "context": tmp_path / "context.txt",
            "output": tmp_path / "run",
            "queries": tmp_path / "queries.jsonl",
            "selfstudy": 0,
            "heldout_share": 0.3,
            "tokens": 8,
            "new_tokens": 6,
            "matching_steps": 10,
            "steps": 5,
            "batch_size": 3,
            "warmup_steps": min(1, options.get("steps", 1)),
            "checkpoint_every": 2,
            "evaluation_sequences": 3,
            "device": "cpu",
        }
        return CompressConfig.model_validate(settings | options)

    return make


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    """A file of three test queries. The first is one of `INPUTS`, the last has an output."""
    lines = [{"input": INPUTS[0]}, {"input": "What does it grind?"}, {"input": "Whose mill?", "output": "Mira's."}]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


class RecordingReporter:
    """Records messages and stages. Raises `error` when `stage` has advanced by `after` units in total."""

    def __init__(self, stage: str = "", after: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.messages: list[str] = []
        self.done: dict[str, int] = {}
        self.stage, self.after, self.error = stage, after, error

    def message(self, text: str) -> None:
        self.messages.append(text)

    @contextlib.contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Any]:
        self.done[description] = 0

        def advance(count: int, **figures: float) -> None:
            self.done[description] += count
            if description == self.stage and self.done[description] == self.after:
                raise self.error

        yield advance
        stopped = any(message.startswith("Stopped at step") for message in self.messages)
        assert self.done[description] == total or stopped, f"{description} ended at {self.done[description]} of {total}"


@pytest.fixture
def recording_reporter() -> type[RecordingReporter]:
    return RecordingReporter


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does not draw its curves and its report: that takes longer than everything else."""
    monkeypatch.setattr("softprompt_kernels.compress.run.save_curves", lambda *_: None)
    monkeypatch.setattr("softprompt_kernels.compress.run.save_report", lambda *_: None)


@pytest.fixture
def full_disk() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with full_disk(room):` limits files to `room` bytes, so that a write stops in the middle, as on a full disk."""
    resource = pytest.importorskip("resource", reason="needs the file size limits of POSIX")

    @contextlib.contextmanager
    def limited(room: int = 256) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def make_targets(
    tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> Any:
    """`make_targets(form="hidden")`: the targets of the examples, written and read back. Options change what of."""
    default = tmp_path_factory.mktemp("targets")

    def make(
        *,
        form: Any = "moments",
        temperature: float = 1.0,
        head: Head | None = None,
        examples: list[Example] = examples,
        folder: Path = default,
    ) -> Targets:
        head = head or head_of(model)
        writer = TargetWriter(folder, head, form, temperature)
        recording = Recording(len(examples), targets=writer)
        watch(model, context, examples, range(len(examples)), recording, SilentReporter(), "")
        writer.close("this")
        found = read_targets(folder, "this", head, form, temperature)
        assert found is not None
        return found

    return make
