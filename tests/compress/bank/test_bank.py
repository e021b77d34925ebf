"""A bank of several contexts: each as alone, bad ones skipped, resumed with the same bits, extended later."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.compress import CompressConfig, compress
from softprompt_kernels.compress.bank.run import compress_bank
from softprompt_kernels.compress.bank.trainer import BankTrainer
from softprompt_kernels.errors import SoftPromptError


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.01, "matching_rows": 400, "queries": None, "selfstudy": 6},
        {"kind": "embedding", "init": "strided", "token_weights": "student", "micro_batch_size": 2, "steps": 3},
    ],
)
def test_each_prompt_is_that_of_a_run_of_its_own(
    bank: Callable[..., Any],
    alone: Callable[..., Any],
    prompts: Callable[..., Any],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    def records(folder: Path) -> list[list[float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        names = ("step", "loss", "error", "grad_norm")
        return [[line.get(name, 0.0) for name in names] for line in lines]

    summary = bank(**options)
    assert list(summary["contexts"]) == ["boat", "mill", "shop"] and not summary["skipped"]
    for name, found in prompts("bank").items():
        expected = torch.cat([*alone(name, **options).values()])
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
        own, single = records(tmp_path / "bank" / "runs" / name), records(tmp_path / "alone" / name)
        for one, other in zip(own, single, strict=True):
            assert one == pytest.approx(other, rel=1e-3)


def test_bad_contexts_are_skipped_and_the_rest_goes_on(
    bank: Callable[..., Any], texts: Path, recording_reporter: Any
) -> None:
    (texts / "empty.txt").write_text("")
    (texts / "long.txt").write_text("a long text " * 60)
    reporter = recording_reporter()
    summary = bank(reporter=reporter, steps=0)
    assert list(summary["contexts"]) == ["boat", "mill", "shop"]
    assert {name: reason.split()[0] for name, reason in summary["skipped"].items()} == {
        "empty": "empty.txt",
        "long": "context:",
    }
    assert json.loads((texts.parent / "bank" / "bank.json").read_text())["skipped"] == summary["skipped"]
    assert sum(message.startswith("Skipping") for message in reporter.messages) == 2


def test_a_bank_without_a_usable_context_is_refused(bank: Callable[..., Any], texts: Path) -> None:
    (texts / "an_empty_one.txt").write_text("")
    with pytest.raises(SoftPromptError, match="none of the 4 contexts could be compressed; boat: tokens"):
        bank(tokens=400)


def test_a_bank_that_crashes_again_and_again_ends_with_the_same_bits(
    bank: Callable[..., Any], prompts: Callable[..., Any], recording_reporter: Any
) -> None:
    bank("unbroken", contexts_together=2)
    for stage, after in (
        ("mill: Teacher's answers", 1),
        ("Matching of 2 contexts", 20),
        ("Training of 2 contexts", 3),
        ("mill: Soft prompt, held-out queries", 2),
        ("Training of 1 context", 5),
    ):
        with pytest.raises(SystemError):
            bank(reporter=recording_reporter(stage, after, SystemError), contexts_together=2)
    bank(contexts_together=2)
    for name, found in prompts("bank").items():
        assert torch.equal(found, prompts("unbroken")[name]), name


def test_a_bank_is_extended_and_leaves_what_is_finished(
    bank: Callable[..., Any], texts: Path, recording_reporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = texts / "shop.txt"
    later = shop.rename(tmp_path / "later.txt")
    assert len(bank(steps=1)["contexts"]) == 2
    runs = tmp_path / "bank" / "runs"
    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()}
    later.rename(shop)
    reporter = recording_reporter()
    step, locked = BankTrainer.train_step, []

    def train_step(trainer: BankTrainer) -> Any:
        locked.extend(file.parent.name for file in runs.glob("*/.lock"))
        return step(trainer)

    monkeypatch.setattr(BankTrainer, "train_step", train_step)
    assert len(bank(reporter=reporter, steps=1)["contexts"]) == 3
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert locked == ["shop"], "each locked folder has an open file"
    assert "Training of 1 context" in reporter.done
    with pytest.raises(SoftPromptError, match="holds another bank, which differs in seed, steps"):
        bank(steps=2, seed=1)


def test_the_training_of_other_contexts_is_not_lost(
    bank: Callable[..., Any], texts: Path, recording_reporter: Any, tmp_path: Path
) -> None:
    with pytest.raises(SystemError):
        bank(reporter=recording_reporter("Training of 3 contexts", 3, SystemError))
    others = tmp_path / "others"
    others.mkdir()
    (others / "more.txt").write_text("Another text about another mill, with some words in it.")
    with pytest.raises(SoftPromptError, match="has none of the contexts whose training is under way"):
        bank(context=others)
    (texts / "mill.txt").unlink()
    assert list(bank()["contexts"]) == ["boat", "shop"]


def test_contexts_leave_when_they_fail_or_have_converged_and_the_others_stay(
    bank: Callable[..., Any],
    alone: Callable[..., Any],
    prompts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    recording_reporter: Any,
    tmp_path: Path,
) -> None:
    accumulate = BankTrainer.accumulate

    def accumulated(trainer: BankTrainer, chosen: Any) -> dict[str, float]:
        losses = accumulate(trainer, chosen)
        changed = {"mill": math.nan if trainer.step == 1 else losses["boat"], "shop": 0.0}
        return losses | {name: changed[name] for name in losses if name in changed}

    monkeypatch.setattr(BankTrainer, "accumulate", accumulated)
    options = {"steps": 7, "init": "strided"}
    with pytest.raises(SystemError):
        bank(reporter=recording_reporter("Training of 3 contexts", 6, SystemError), converged=1e-9, **options)
    summary = bank(converged=1e-9, **options)
    assert summary["skipped"]["mill"].startswith("learning_rate: at step 2 the loss is nan")
    assert {name: figures["steps"] for name, figures in summary["contexts"].items()} == {"boat": 7, "shop": 5}
    for name, steps in (("boat", 7), ("shop", 5)):
        lines = (tmp_path / "bank" / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, steps + 1)]
    torch.testing.assert_close(prompts("bank")["boat"], torch.cat([*alone("boat", **options).values()]))


def test_json_lines_bring_their_own_queries(
    texts: Path, make_config: Callable[..., CompressConfig], no_plot: None
) -> None:
    file = texts.parent / "many.jsonl"
    queries = [{"input": "Who?"}, {"input": "How many?", "output": "Forty."}, {"input": "Where?"}]
    text = (texts / "mill.txt").read_text()
    lines = [{"name": "own", "text": text, "queries": queries}, {"text": text}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = compress(make_config(context=file, queries=None, output=texts.parent / "bank", steps=0))
    assert list(summary["contexts"]) == ["own"]
    assert summary["skipped"] == {"line-2": "queries: missing, and selfstudy=0 generates none"}


def test_what_is_not_there_for_many_contexts_is_refused(bank: Callable[..., Any]) -> None:
    with pytest.raises(SoftPromptError, match="rounds: got 1 for many contexts"):
        bank(rounds=1)
    with pytest.raises(SoftPromptError, match="track: got tensorboard"):
        bank(track="tensorboard")


def test_a_folder_with_other_files_is_refused(
    texts: Path, make_config: Callable[..., CompressConfig], loaded: Any
) -> None:
    with pytest.raises(SoftPromptError, match="do not belong to a bank"):
        compress_bank(make_config(context=texts, output=texts), None, loaded)
