"""The training of a compressor from contexts to its folder, and what is done with it: read, compress, evaluate."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import (
    CompressConfig,
    CompressorConfig,
    Interrupted,
    SilentReporter,
    compress,
    load_compressor,
    plan,
    plan_compressor,
    read_context,
    read_once,
    train_compressor,
)
from softprompt_kernels.compress.compressor.form import Form
from softprompt_kernels.compress.compressor_runs.inputs import load_compressor_inputs
from softprompt_kernels.compress.start import compress as start_compress
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import load

pytestmark = pytest.mark.usefixtures("one_thread", "no_plot")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TEXT = "Mill {0} grinds {1} sacks a day. The river Osk turns it. Visitors pay {0} crowns to see wheel {1}."


@pytest.fixture
def make_training(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., CompressorConfig]:
    """`make_training(steps=2)`: a training on six contexts, of which one is empty."""
    lines = [{"name": f"mill-{i}", "text": TEXT.format(i, 40 + i), "queries": [{"input": "Who?"}]} for i in range(5)]
    lines.append({"name": "bad", "text": " "})
    (tmp_path / "contexts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**options: Any) -> CompressorConfig:
        settings = {
            "model": str(tiny_model_folder),
            "contexts": tmp_path / "contexts.jsonl",
            "output": tmp_path / "training",
            "tokens": 4,
            "lora_rank": 2,
            "segment_tokens": 80,
            "selfstudy": 2,
            "new_tokens": 4,
            "steps": 3,
            "batch_contexts": 2,
            "checkpoint_every": 1,
            "evaluate_every": 2,
            "device": "cpu",
        }
        return CompressorConfig.model_validate(settings | options)

    return make


def test_a_compressor_is_trained_and_makes_prompts(
    make_training: Callable[..., CompressorConfig],
    make_config: Callable[..., CompressConfig],
    recording_reporter: Any,
    loaded: Loaded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, reporter = make_training(), recording_reporter()
    names = [name for name, _ in loaded[0].named_parameters()]
    figures = train_compressor(config, reporter, loaded)
    assert reporter.messages == [
        "Skipped the context bad: contexts.jsonl, line 6 is empty, accepted is text with at least one word"
    ]
    assert figures["skipped"].keys() == {"bad"}
    assert figures["contexts"] == {"train": 3, "heldout": 1, "test": 1}
    for name in ("heldout", "test"):
        assert figures[name]["recovered"] == pytest.approx(1 - figures[name]["kl_prompt"] / figures[name]["kl_none"])
        assert {"kl_truncated", "kl_untrained", "top1_agreement", "tokens"} <= figures[name].keys()
        assert len(figures[name]["contexts"]) == 1
    assert figures["heldout"]["contexts"].keys() != figures["test"]["contexts"].keys()
    records = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert ["heldout_kl" in record for record in records] == [False, True, True]
    best = min(record["heldout_kl"] for record in records[1:])
    assert figures["heldout"]["kl_prompt"] == pytest.approx(best, rel=1e-5), "the best step is what is saved"
    assert [name for name, _ in loaded[0].named_parameters()] == names
    assert train_compressor(config, recording_reporter(), loaded) == figures, "finished"
    with pytest.raises(SoftPromptError, match="holds another run, which differs in learning_rate"):
        train_compressor(make_training(learning_rate=1e-3), None, loaded)

    folder = config.output / "compressor"
    text = tmp_path / "context.txt"
    text.write_text(TEXT.format(7, 70))
    sizes = read_context("", text, folder, tmp_path / "prompt", loaded=loaded)
    prompt, record = load(tmp_path / "prompt", *loaded)
    assert sizes == {"context_tokens": record["context"]["tokens"], "prompt_tokens": 4}
    assert record["objective"]["init"] == "compressor"

    text.write_text("No.")
    with (
        monkeypatch.context() as patched,
        pytest.raises(SoftPromptError, match=r"got \d+ tokens, accepted are more than"),
    ):
        patched.setattr(Form, "prompt_tokens", lambda form, tokens: tokens)
        read_context("", text, folder, tmp_path / "none", loaded=loaded)
    assert not (tmp_path / "none").exists()

    run = make_config(init="compressor", compressor=folder, tokens=4, steps=0, context=text)
    text.write_text(TEXT.format(7, 70))
    compressed = compress(run)
    same, _ = load(run.output / "prompt", *loaded)
    assert all(torch.equal(a, b) for a, b in zip(prompt.stacked(), same.stacked(), strict=True))
    assert compressed["start"] == "prompt"
    assert plan(run).estimated_seconds["training"] == 0


def test_an_interrupted_training_ends_with_the_same_bits(
    make_training: Callable[..., CompressorConfig], recording_reporter: Any, loaded: Loaded, tmp_path: Path
) -> None:
    whole = train_compressor(make_training(), None, loaded)
    stopped = make_training(output=tmp_path / "stopped")
    for stage, after in (("Teacher's answers, training contexts", 2), ("Training", 2)):
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            train_compressor(stopped, recording_reporter(stage, after), loaded)
    reporter = recording_reporter()
    figures = train_compressor(stopped, reporter, loaded)
    assert "Resuming from step 2." in reporter.messages
    left_out = ("seconds", "stages")
    assert {k: v for k, v in figures.items() if k not in left_out} == {
        k: v for k, v in whole.items() if k not in left_out
    }
    files = [
        [(folder / "compressor" / name).read_bytes() for name in ("summary.safetensors", "adapter_model.safetensors")]
        for folder in (make_training().output, stopped.output)
    ]
    assert files[0] == files[1]


def test_a_context_with_fewer_tokens_than_the_longest_has_segments_is_skipped(
    make_training: Callable[..., CompressorConfig], loaded: Loaded, tmp_path: Path
) -> None:
    config = make_training(segment_tokens=2, tokens=1, steps=2)
    lines = [{"name": f"long-{i}", "text": TEXT.format(i, 40) * 2} for i in range(4)]
    config.contexts.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"name": "short", "text": "No."}]))
    inputs = load_compressor_inputs(config, SilentReporter(), loaded)
    assert re.match(
        r"it has \d\d tokens, accepted are 1\d\d or more, the segments of the longest", inputs.skipped["short"]
    )
    assert sum(map(len, inputs.sets.values())) == 4


def test_a_plan_writes_nothing(make_training: Callable[..., CompressorConfig], loaded: Loaded) -> None:
    config = make_training(state="accumulated", segment_tokens=80)
    found = plan_compressor(config, None, loaded)
    assert found.contexts == {"train": 3, "heldout": 1, "test": 1}
    assert found.skipped == 1
    assert found.prompt_tokens == (8, 8)
    assert found.kl_none > 0
    assert not config.output.exists()
    assert not any("lora" in name for name, _ in loaded[0].named_parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tokens": 200}, r"contexts: got 0 that can be used, .*; mill-0: it has 1\d\d tokens, accepted are more"),
        (
            {"state": "accumulated", "segment_tokens": 4},
            r"mill-0: it has 1\d\d tokens, accepted are more than the 1\d\d",
        ),
        ({"segment_tokens": 600, "segments": 9}, "segment_tokens: got 600 for a model with a window of 512"),
        ({"contexts": Path("none")}, "^contexts: none cannot be read"),
        ({"new_tokens": 500}, "needs .* tokens with context and output, accepted are 512"),
    ],
)
def test_contexts_that_do_not_fit_are_named(
    make_training: Callable[..., CompressorConfig], loaded: Loaded, options: dict[str, Any], match: str
) -> None:
    config = make_training(**options)
    with pytest.raises(SoftPromptError, match=match):
        train_compressor(config, None, loaded)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"warmup_steps": 9}, "warmup_steps: got 9, accepted is at most steps=3"),
        ({"test_share": 0.95}, "test_share: got 0.95 with heldout_share=0.1, accepted is less than 0.9"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    make_training: Callable[..., CompressorConfig], options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        make_training(**options)


def test_compress_refuses_a_compressor_that_does_not_fit(
    make_config: Callable[..., CompressConfig],
    make_training: Callable[..., CompressorConfig],
    loaded: Loaded,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="compressor: got None with kind=kv, accepted with init=compressor"):
        make_config(init="compressor")
    with pytest.raises(ValueError, match="compressor: given, but init=strided does not use it"):
        make_config(init="strided", compressor="x")
    train_compressor(training := make_training(lora_rank=0, steps=1, segment_tokens=60), None, loaded)
    folder = training.output / "compressor"
    run = make_config(init="compressor", compressor=folder, tokens=5)
    with pytest.raises(SoftPromptError, match=r"tokens: got 5, accepted with the compressor .* is 4"):
        start_compress(run)
    assert not run.output.exists()
    compressor = load_compressor(folder, *loaded)
    assert read_once(compressor, torch.arange(130) + 60).length == 4
    record = json.loads((folder / "compressor.json").read_text())
    record["trained"]["template_arguments"] = {"hour": 9}
    (folder / "compressor.json").write_text(json.dumps(record))
    with pytest.raises(SoftPromptError, match="got 'hour', accepted are variables that the chat template uses"):
        read_context("", run.context, folder, tmp_path / "prompt", loaded=loaded)
