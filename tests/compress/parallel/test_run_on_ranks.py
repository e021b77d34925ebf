"""A whole run on two processes, against the same run on one."""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompt_kernels.cli import main
from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.compress.bank.run import compress_bank
from softprompt_kernels.compress.composition.compose import compose
from softprompt_kernels.compress.compressor_runs.config import CompressorConfig
from softprompt_kernels.compress.compressor_runs.run import train_compressor
from softprompt_kernels.compress.distill.trainer import Trainer
from softprompt_kernels.errors import SoftPromptError

Settings = dict[str, Any]


@pytest.fixture
def runs(make_config: Callable[..., CompressConfig], tmp_path: Path) -> Callable[..., CompressConfig]:
    """`runs("name")`: twenty steps after matching in a folder, with equal queries, a given output and micro-batches."""
    with (tmp_path / "queries.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"input": "Whose mill?", "output": "Mira's."}) + "\n")

    def make(name: str, **options: Any) -> CompressConfig:
        settings: Settings = {"steps": 20, "matching_steps": 20, "samples": 2, "micro_batch_size": 2, "batch_size": 5}
        return make_config(
            **(settings | {"output": tmp_path / name, "checkpoint_every": 5, "evaluate_every": 10} | options)
        )

    return make


def sigma(config: CompressConfig) -> torch.Tensor:
    return load_file(config.output / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]


def difference(one: CompressConfig, other: CompressConfig) -> float:
    return float((sigma(one) - sigma(other)).norm() / sigma(one).norm())


def test_two_ranks_give_the_prompt_of_one_process(
    runs: Callable[..., CompressConfig], on_ranks: Callable[..., Any], no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: dict[str, Settings] = {
        "matched": {},
        "rounds": {"rounds": 1, "init": "strided", "steps": 6},
        "embedding": {
            "kind": "embedding",
            "init": "strided",
            "steps": 6,
            "token_weights": "student",
            "objective": "jsd",
        },
        "small": {"batch_size": 1, "micro_batch_size": 1, "init": "first", "steps": 4, "context_memory": 1e-9},
        "segments": {"segment_tokens": 64, "selfstudy": 6, "queries": None, "replay": 5, "steps": 3, "tokens": 6},
    }
    ended = on_ranks(2, lambda rank: [compress(runs(f"{name} two", **v))["heldout"] for name, v in variants.items()])
    for end in ended:
        assert not end.error, end.error
    assert ended[0].value == ended[1].value
    for (name, settings), figures in zip(variants.items(), ended[0].value, strict=True):
        one, two = runs(f"{name} one", **settings), runs(f"{name} two", **settings)
        assert compress(one)["heldout"] == pytest.approx(figures, rel=1e-4, abs=1e-6), name
        # A segment begins with the rounding of the one before.
        assert difference(one, two) < (1e-6 if name != "segments" else 1e-4), name
        for file in ("cache/examples.json", "queries.jsonl") if "segment_tokens" not in settings else ():
            assert (one.output / file).read_text() == (two.output / file).read_text(), (name, file)


def test_the_end_of_one_rank_ends_all_and_the_run_resumes_with_the_same_bits(
    runs: Callable[..., CompressConfig], on_ranks: Callable[..., Any], no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, whole, step_of = runs("stopped"), runs("whole"), Trainer.train_step
    other_text = stopped.output.with_name("other.txt")
    other_text.write_text("Another text, which is long enough to be compressed.", encoding="utf-8")

    def stop_at(step: int, stop: Callable[[], None]) -> None:
        def train_step(trainer: Trainer) -> Any:
            if trainer.step == step:
                stop()
            return step_of(trainer)

        monkeypatch.setattr(Trainer, "train_step", train_step)

    def fail() -> None:
        raise SoftPromptError("learning_rate: too large for this rank")

    def signalled(number: int) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), number)

    def outcome(config: CompressConfig) -> list[Any]:
        begin = time.monotonic()
        with pytest.raises((SoftPromptError, Interrupted)) as raised:
            compress(config)
        return [str(raised.value), time.monotonic() - begin]

    def broken(rank: int) -> list[Any]:
        other = stopped.model_copy(update={"context": other_text}) if rank else stopped
        found = [outcome(other)]
        for step, stop in ((7, fail), (12, signalled(signal.SIGTERM)), (17, signalled(signal.SIGKILL))):
            if rank == 1:
                stop_at(step, stop)
            found.append(outcome(stopped))
        return found

    first, second = on_ranks(2, broken)
    assert not first.error, first.error
    texts, seconds = zip(*first.value, strict=True)
    assert texts[0].startswith("torchrun: process 1 of 2 differs from process 0 in context, tokens of context")
    assert texts[1] == "process 1: learning_rate: too large for this rank"
    assert texts[2].startswith("Stopped at step 12 of 20; saved in")
    assert "has ended without a word" in texts[3]
    assert max(seconds) < 20
    assert os.WTERMSIG(second.status) == signal.SIGKILL

    def printed(rank: int, *arguments: str) -> str:
        streams, text = (sys.stdout, sys.stderr), io.StringIO()
        sys.stdout = sys.stderr = text
        with pytest.raises(SystemExit) as ended:
            main(["compress", "--config", str(whole.output / "config.yaml"), *arguments])
        sys.stdout, sys.stderr = streams
        return f"{ended.value.code} {text.getvalue()}"

    def resumed(rank: int) -> list[str]:
        compress(stopped)
        compress(whole)
        again = ("--output", str(whole.output.with_name("new")))
        return [printed(rank), printed(rank, *again, "--tokens", "999"), printed(rank, *again, "--frozen-tokens", "99")]

    first, second = on_ranks(2, resumed)
    assert not first.error and not second.error, first.error + second.error
    assert torch.equal(sigma(stopped), sigma(whole))
    assert "is already finished" in first.value[0] and "soft prompt" in first.value[0]
    assert first.value[1].startswith("2 Loading") and "Error: tokens: got 999" in first.value[1]
    assert first.value[2].startswith("2 Error: frozen_tokens: got 99")
    assert second.value == ["0 ", "2 ", "2 "]


def test_what_takes_one_process_refuses_torchrun(runs: Callable[..., CompressConfig], monkeypatch: Any) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    calls: dict[str, Callable[[], Any]] = {
        "a composition": lambda: compose(["one", "two"], "joined"),
        "a compressor": lambda: train_compressor(CompressorConfig.model_construct()),
        "many contexts": lambda: compress_bank(runs("bank")),
    }
    for what, call in calls.items():
        with pytest.raises(SoftPromptError, match=f"got 2 processes for {what}, accepted is one"):
            call()
