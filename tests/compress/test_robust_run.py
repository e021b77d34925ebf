"""Runs that stop at a plateau, save their best step, diverge, or meet a full disk or a damaged file."""

import errno
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.compress.distill import checkpoint
from softprompt_kernels.compress.distill.trainer import Trainer
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.matching import match
from softprompt_kernels.compress.report.html.page import headline
from softprompt_kernels.compress.report.html.run_data import read_run
from softprompt_kernels.compress.report.metrics import heldout_points, read_metrics
from softprompt_kernels.compress.report.table import training_line
from softprompt_kernels.compress.teacher import moments_cache, rows
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import load

Make = Callable[..., CompressConfig]
FullDisk = Callable[..., AbstractContextManager[None]]

pytestmark = pytest.mark.usefixtures("no_plot", "one_thread")

CHOOSING = {"init": "strided", "steps": 8, "evaluate_every": 2, "save_best": True, "patience": 2, "checkpoint_every": 3}


@pytest.fixture
def heldout_kls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`heldout_kls(0.5, 0.4)`: what the held-out evaluations of the training give, by their step // 2."""
    from softprompt_kernels.compress.training import Training

    def give(*values: float) -> list[int]:
        asked: list[int] = []

        def heldout_kl(self: Training) -> float:
            asked.append(self.trainer.step)
            return values[self.trainer.step // 2]

        monkeypatch.setattr(Training, "heldout_kl", heldout_kl)
        return asked

    return give


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_results(first: Path, second: Path) -> None:
    for name in ("checkpoint.safetensors", "prompt/adapter_model.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert steps(first) == steps(second)
    figures = [json.loads((folder / "evaluation.json").read_text()) for folder in (first, second)]
    for one in figures:
        del one["seconds"], one["stages"]
    assert figures[0] == figures[1]


# The best step, and a plateau


def test_the_best_prompt_is_saved_and_training_stops_at_a_plateau(
    make_config: Make,
    heldout_kls: Any,
    recording_reporter: Any,
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, config, reporter = heldout_kls(0.5, 0.4, 0.6, 0.45, 0.1), make_config(**CHOOSING), recording_reporter()
    at_step: dict[int, torch.Tensor] = {}
    step = Trainer.train_step

    def keep(self: Trainer) -> Any:
        report = step(self)
        at_step[report.step] = self.prompt.state_dict()["key"].clone()
        return report

    monkeypatch.setattr(Trainer, "train_step", keep)
    figures = compress(config, reporter)
    assert asked == [0, 2, 4, 6]
    assert figures["training"] == {"steps": 6, "of": 8, "saved_step": 2, "best_heldout_kl": 0.4}
    assert steps(config.output) == [1, 2, 3, 4, 5, 6]
    assert reporter.done["Training"] == 6
    saved, record = load(config.output / "prompt", model)
    assert torch.equal(saved.state_dict()["key"], at_step[2])
    assert record["objective"]["steps"] == 2
    assert any(message.startswith("Stopped at step 6 of 8: no held-out KL") for message in reporter.messages)
    line = training_line(figures)
    assert line.startswith("Prompt of step 2 of 8, chosen by the held-out KL, stopped at step 6 by a plateau")
    assert line.endswith("Its held-out figures are of the queries that chose it.")
    assert headline(read_run(config.output)).endswith(line)
    _, training = read_metrics(config.output / "metrics.jsonl")
    assert dict(heldout_points(training, figures))[2] == figures["heldout"]["kl_prompt"]


@pytest.mark.parametrize(("values", "saved"), [((0.1, 0.4, 0.6), 0), ((0.5, 0.4, 0.3), 4)], ids=["first", "last"])
def test_the_prompt_before_training_and_the_last_one_take_part(
    make_config: Make, heldout_kls: Any, values: tuple[float, ...], saved: int
) -> None:
    asked = heldout_kls(*values)
    figures = compress(make_config(**CHOOSING | {"steps": 4, "evaluate_every": 3, "patience": 0}))
    assert asked == [0, 3, 4]
    assert figures["training"]["saved_step"] == saved
    same = figures["heldout"]["kl_prompt"] == pytest.approx(figures["heldout"]["kl_untrained"], rel=1e-6)
    assert same == (saved == 0)


def test_without_the_options_nothing_is_chosen(make_config: Make, heldout_kls: Any) -> None:
    asked, config = heldout_kls(0.5, 0.4, 0.6, 0.7, 0.8), make_config(init="strided", steps=5, evaluate_every=2)
    figures = compress(config)
    assert asked == [2, 4]
    assert "training" not in figures
    assert training_line(figures) == ""
    assert not (config.output / "best.safetensors").exists()


def test_the_evaluations_belong_to_a_run_that_chooses_by_them(make_config: Make) -> None:
    compress(make_config(**CHOOSING | {"steps": 2}))
    with pytest.raises(SoftPromptError, match="differs in evaluate_every;"):
        compress(make_config(**CHOOSING | {"steps": 2, "evaluate_every": 1}))


@pytest.mark.parametrize("option", [{"save_best": True}, {"patience": 2}], ids=str)
def test_choosing_without_evaluations_is_refused(make_config: Make, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(save_best: got true|patience: got 2), but evaluate_every=0"):
        make_config(**option)


@pytest.mark.parametrize("lost", ["checkpoint", "best"])
def test_a_damaged_file_of_a_run_that_chooses(
    make_config: Make, heldout_kls: Any, recording_reporter: Any, tmp_path: Path, lost: str
) -> None:
    heldout_kls(0.5, 0.4, 0.6, 0.3, 0.2)
    options = CHOOSING | {"keep_checkpoints": 2, "patience": 3}
    whole, config = make_config(output=tmp_path / "whole", **options), make_config(**options)
    compress(whole)
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 5))
    folder, reporter = RunFolder(config.output), recording_reporter()
    if lost == "checkpoint":
        folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:-9])
        compress(config, reporter)
        assert "Resuming from step 3." in reporter.messages
        assert any("is damaged" in message for message in reporter.messages)
    else:
        content = folder.best.read_bytes()
        folder.best.unlink()
        with pytest.raises(SoftPromptError, match=r"save_best: .*best.safetensors has not the prompt of step 2"):
            compress(config)
        folder.best.write_bytes(content)
        compress(config)
    assert_same_results(config.output, whole.output)


@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_in_a_held_out_evaluation_loses_neither_the_step_nor_the_evaluation(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recording_reporter: Any, step: int
) -> None:
    from softprompt_kernels.compress.training import Training

    options = CHOOSING | {"learning_rate": 1e-3}  # so small that every step is better than the one before
    whole, config = make_config(output=tmp_path / "whole", **options), make_config(**options)
    compress(whole)
    evaluate = Training.heldout_kl

    def interrupted(self: Training) -> float:
        if self.trainer.step == step:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(Training, "heldout_kl", interrupted)
    with pytest.raises(Interrupted) as stop:
        compress(config)
    assert stop.value.step == step
    monkeypatch.setattr(Training, "heldout_kl", evaluate)
    with pytest.raises(SystemError):  # killed as soon as the evaluation is made up for
        compress(config, recording_reporter("Training", step + 1, SystemError))
    compress(config)
    assert_same_results(config.output, whole.output)


# A training that diverges


@pytest.mark.parametrize("damaged", ["loss", "prompt", "moment"])
def test_a_run_that_diverges_goes_on_from_its_last_good_state_with_a_smaller_rate(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, recording_reporter: Any, damaged: str
) -> None:
    settings = {"init": "strided", "steps": 6, "checkpoint_every": 2}
    config, step, accumulate = make_config(**settings), torch.optim.AdamW.step, Trainer.accumulate
    good = 3 if damaged == "loss" else 2  # of the step before; after a bad update, of the last checkpoint

    def bad_loss(self: Trainer, chosen: Any) -> float:
        return float("nan") if self.step == 3 else accumulate(self, chosen)

    def bad_update(self: Any, closure: None = None) -> None:
        step(self, closure)
        state = self.state[self.param_groups[0]["params"][0]]
        if float(state["step"]) == 4:
            tensor = state["exp_avg_sq"] if damaged == "moment" else self.param_groups[0]["params"][0].detach()
            tensor[0, 0, 0] = float("inf")

    with monkeypatch.context() as patch:
        if damaged == "loss":
            patch.setattr(Trainer, "accumulate", bad_loss)
        else:
            patch.setattr(torch.optim.AdamW, "step", bad_update)
        for _ in range(2):  # the same call ends in the same way
            with pytest.raises(SoftPromptError, match=rf"step 4 .*last good state, of step {good}, is in .*smaller"):
                compress(config)
    state = load_file(config.output / "checkpoint.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    for options in ({"steps": 7}, {"steps": 7, "learning_rate": 1e-3}):
        with pytest.raises(SoftPromptError, match=r"differs in (learning_rate, )?steps;"):
            compress(make_config(**settings | options))
    reporter = recording_reporter()
    slower = make_config(**settings, learning_rate=1e-3)
    figures = compress(slower, reporter)
    assert f"Resuming from step {good}." in reporter.messages
    assert figures["training"]["changes"] == [{"step": good, "learning_rate": 1e-3}]
    assert f"from step {good} on with learning_rate 0.001" in training_line(figures)
    assert compress(slower) == figures
    with pytest.raises(SoftPromptError, match="differs in learning_rate;"):
        compress(config)


# A full disk

FILES = (
    "cache/targets/00000.safetensors",
    "cache/targets/index.json",
    "cache/rows-00000.safetensors",
    "cache/examples.json",
    "cache/matched-00000.safetensors",
    "checkpoint.safetensors",
    "best.safetensors",
    "metrics.jsonl",
    "cache/rounds/1/answers.json",
    "stages.json",
    "answers.md",
    "evaluation.json",
)
"""In the order in which a run writes them."""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_named_and_loses_nothing(
    make_config: Make, tmp_path: Path, full_disk: FullDisk, monkeypatch: pytest.MonkeyPatch, recording_reporter: Any
) -> None:
    options = {"steps": 4, "evaluate_every": 1, "save_best": True, "rounds": 1}
    whole, config = make_config(output=tmp_path / "whole", **options), make_config(**options)
    compress(whole)
    with pytest.raises(KeyboardInterrupt):
        compress(config, recording_reporter("Teacher's answers", 6))
    for name in FILES:
        target = config.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            if name == "metrics.jsonl":  # the only file that grows
                fill(patch, full_disk, RunFolder, "add_metrics", lambda folder, _: folder.metrics.stat().st_size + 20)
            elif target.suffix == ".safetensors":
                for module in (moments_cache, rows, match, checkpoint):
                    fill(patch, full_disk, module, "save_file", partial(room_for, target.name))
            else:
                target.with_name(f"{target.name}.partial").symlink_to("/dev/full")
            with pytest.raises(OSError, match=str(target)) as error:
                compress(config)
        assert error.value.errno == (errno.ENOSPC if target.suffix in (".json", ".md") else errno.EFBIG)
        assert error.value.filename == str(target)
        assert not list(config.output.rglob("*.partial"))
    compress(config)
    assert_same_results(config.output, whole.output)


def room_for(full: str, tensors: Any, path: Path, *_: Any) -> int:
    return 64 if full in path.name else 0


def fill(patch: pytest.MonkeyPatch, full_disk: FullDisk, owner: Any, name: str, room: Callable[..., int]) -> None:
    """The disk has no more than `room` bytes while a function writes; 0: it is not full."""
    write = getattr(owner, name)

    def limited(*arguments: Any) -> Any:
        left = room(*arguments)
        with full_disk(left) if left else nullcontext():
            return write(*arguments)

    patch.setattr(owner, name, limited)
