"""A text compressed in segments: what it leaves, how it resumes, what it refuses, and what it keeps of facts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompt_kernels.compress import CompressConfig, Interrupted, compress, plan
from softprompt_kernels.compress.diagnose.collect import run_config
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.sequential.table import distance_table
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts.adapter import read
from tests.compress.sequential.planted_facts import plant, save_long_model, settings, silent

Make = Callable[..., CompressConfig]
TEXT = " ".join(f"The {n} mills of {place} grind {7 * n} sacks." for n, place in enumerate(("Osk", "Tarn", "Vale"), 2))


@pytest.fixture
def make(make_config: Make, tmp_path: Path) -> Make:
    """`make(state="accumulated")`: a short run over three segments."""

    def call(**options: Any) -> CompressConfig:
        config = make_config()  # writes its files
        (tmp_path / "context.txt").write_text(options.pop("text", TEXT))
        own = {"segment_tokens": 64, "selfstudy": 6, "queries": None, "replay": 5, "steps": 3, "tokens": 6}
        return CompressConfig.model_validate(config.model_dump() | own | options)

    return call


pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.mark.parametrize("state", ["replaced", "accumulated"])
def test_an_interrupted_run_goes_on_in_its_segment_and_ends_with_the_same_bits(
    make: Make, tmp_path: Path, recording_reporter: Any, state: str
) -> None:
    config = make(state=state, keep_checkpoints=2)
    figures = compress(config)
    again = config.model_copy(update={"output": tmp_path / "again"})
    for stage in ("2/3 Matching", "3/3 Training"):
        with pytest.raises(Interrupted, match=f"in segment {stage[0]} of 3") as stop:
            compress(again, recording_reporter(stage, 2))
        assert stop.value.output == again.output
        assert not (again.output / "evaluation.json").exists()
        if stage[0] == "2":
            first = read(again.output / "segments" / "0001" / "prompt").prompt.stacked()
    resumed = compress(again)
    weights = [load_file(run / "prompt" / "adapter_model.safetensors") for run in (config.output, again.output)]
    assert torch.equal(weights[0]["prompt_embeddings"], weights[1]["prompt_embeddings"])
    for name in ("heldout", "train"):
        assert resumed[name] == figures[name]
    (again.output / "segments" / "0001" / "asked.json").touch()  # of a run that was killed just before it ended
    assert compress(again) == resumed, "a finished run returns its figures"
    assert {path.name for path in (again.output / "segments" / "0001").iterdir()} == {
        *(["prompt"] if state == "replaced" else []),
        *("metrics.jsonl", "queries.jsonl", "segment.json"),
    }

    prompt, length = read(config.output / "prompt").prompt, 6 if state == "replaced" else 18
    assert prompt.length == figures["prompt_tokens"] == length
    kept = [torch.equal(one[:, :, :6], two) for one, two in zip(prompt.stacked(), first, strict=True)]
    assert kept == [state == "accumulated"] * 2, "an accumulated prompt begins with that of the first segment"
    assert prompt.frozen_tokens == (1 if state == "replaced" else 12)
    segments = figures["segments"]
    assert [one["prompt_tokens"] for one in segments["by_segment"]] == ([6] * 3 if state == "replaced" else [6, 12, 18])
    assert [one["replayed_queries"] for one in segments["by_segment"]][:1] == [0]
    assert all(0 < one["replayed_queries"] <= 5 for one in segments["by_segment"][1:])
    assert segments["teacher"] == "whole text"
    assert [row[0] for row in distance_table(segments)[1]] == [f"{one['from']}" for one in segments["by_distance"]]
    left = {path.name for path in (config.output / "segments" / "0003").iterdir()}
    assert left == {"prompt", "metrics.jsonl", "queries.jsonl", "segment.json"}
    with pytest.raises(SoftPromptError, match="in segments"):
        run_config(RunFolder(config.output))


def test_a_text_beyond_the_window_is_measured_by_the_teachers_of_its_segments(make: Make) -> None:
    figures = compress(make(text=" ".join([TEXT] * 5), segment_tokens=300, steps=0, selfstudy=4))
    assert figures["context_tokens"] > 512
    assert figures["segments"]["teacher"] == "each segment's own"
    assert figures["heldout"]["tokens"] == sum(one.get("answer_tokens", 0) for one in figures["segments"]["by_segment"])


def test_the_forecast_counts_segments_and_writes_nothing(make: Make) -> None:
    config = make(state="accumulated")
    found = plan(config)
    assert (found.segments, found.prompt_tokens) == (3, 18)
    assert found.disk_bytes and found.disk_bytes > 3 * found.prompt_bytes
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_tokens": 2000}, "together, the model's window"),
        ({"segment_tokens": 400, "tokens": 120, "state": "accumulated"}, "state=replaced has the same"),
        ({"segment_tokens": 480, "new_tokens": 90}, "the model's window"),
        ({"segment_tokens": 64, "tokens": 63}, "accepted is a size that leaves each more than tokens=63"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    make: Make, options: dict[str, Any], message: str
) -> None:
    text = " ".join([TEXT] * (8 if options["segment_tokens"] > 100 else 1))
    config = make(text=text, **options)
    with pytest.raises(SoftPromptError, match=message):
        compress(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_tokens": 6}, "accepted is more than tokens=6"),
        ({"segment_tokens": None}, "only segments use them"),
        ({"kind": "embedding", "init": "first"}, "accepted are kind=kv"),
        ({"rounds": 1}, "rounds: got 1 with segment_tokens"),
        ({"server": "http://localhost:1/v1"}, "server: got http://localhost:1/v1 with segment_tokens"),
        ({"save_best": True, "evaluate_every": 1}, "save_best: got True with segment_tokens"),
        ({"patience": 2, "evaluate_every": 1}, "patience: got 2 with segment_tokens"),
        ({"context_dtype": "bfloat16"}, "context_dtype: got bfloat16 with segment_tokens"),
        ({"context_memory": 0}, "context_memory: got 0.0 with segment_tokens"),
        ({"contexts_together": 2}, "contexts_together: got 2 with segment_tokens"),
        ({"converged": 0}, "converged: got 0.0 with segment_tokens"),
    ],
)
def test_options_that_do_not_go_together_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("state", "tokens", "steps", "least"), [("replaced", 14, 25, 0.98), ("accumulated", 6, 0, 0.9)]
)
def test_facts_of_all_segments_are_recalled(tmp_path: Path, state: str, tokens: int, steps: int, least: float) -> None:
    """A replaced prompt recovers .47 without replay, and .95 without queries about the next segment."""
    model, files = save_long_model(tmp_path / "model"), plant(tmp_path, 3, 180, 12)
    options = {"segment_tokens": 65, "state": state, "tokens": tokens, "steps": steps, "matching_steps": 100}
    with silent():
        figures = compress(settings(model, files, tmp_path / "run", **options))
    assert len(figures["segments"]["by_segment"]) == 3
    assert figures["heldout"]["recovered"] > least
    assert json.loads((tmp_path / "run" / "segments" / "0002" / "segment.json").read_text())["replayed_queries"] == 16
