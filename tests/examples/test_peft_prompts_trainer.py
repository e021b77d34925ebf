"""The recipe for PEFT prompts in transformers' Trainer: the losses without patch, resuming, and the best prompt."""

import json
import random
import shutil

import pytest
import torch

from examples import peft_prompts_trainer as recipe

KINDS = ("PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING")
ROUNDING = 2e-5
BF16 = 2e-2


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tiny_model_folder, tmp_path, monkeypatch):
    """`run(kind, *arguments, patched=True)`: the recipe on texts of different lengths; returns its Trainer."""
    words = random.Random(0)
    texts = [" ".join(words.choices(["lake", "river", "hill", "a", "of"], k=2 + i % 5)) for i in range(18)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def call(kind, *arguments, patched=True, folder="out"):
        with monkeypatch.context() as context:
            if not patched:
                context.setattr(recipe, "patch", lambda model: model)
            torch.manual_seed(0)
            common = {
                "model": tiny_model_folder,
                "data": data,
                "kind": kind,
                "tokens": 5,
                "output_dir": tmp_path / folder,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.05,
                "num_train_epochs": 2,
                "logging_steps": 1,
                "seed": 1,
            }
            options = [text for name, value in common.items() for text in (f"--{name}", str(value))]
            return recipe.main([*options, "--use_cpu", "--disable_tqdm", "true", *arguments])

    return call


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_peft(kind, run):
    ours, theirs = run(kind), run(kind, patched=False, folder="peft")
    assert len(losses(ours)) == 10
    assert losses(ours) == pytest.approx(losses(theirs), abs=ROUNDING)
    assert losses(ours, "eval_loss") == pytest.approx(losses(theirs, "eval_loss"), abs=ROUNDING)
    assert losses(ours)[-1] < losses(ours)[0] - 0.05
    assert type(ours.model).__name__ == "SharedPromptModel"


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_and_bf16(kind, run):
    """PEFT's prefix tuning and cartridges fail with gradient checkpointing, so the losses are compared with ours."""
    plain = losses(run(kind))
    assert losses(run(kind, "--gradient_checkpointing", folder="checkpointed")) == pytest.approx(plain, abs=ROUNDING)
    assert losses(run(kind, "--gradient_checkpointing", "--bf16", folder="bf16")) == pytest.approx(plain, abs=BF16)


def test_torch_compile(run):
    options = ("--max_steps", "2", "--eval_strategy", "no", "--load_best_model_at_end", "false")
    compiled = ("--torch_compile", "--torch_compile_backend", "eager")
    plain = losses(run("PREFIX_TUNING", *options))
    assert losses(run("PREFIX_TUNING", *options, *compiled, folder="compiled")) == pytest.approx(plain, abs=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind, run, tmp_path):
    whole = run(kind, folder="whole")
    (tmp_path / "stopped").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-5", tmp_path / "stopped/checkpoint-5")
    before = (tmp_path / "stopped/checkpoint-5/trainer_state.json").stat()
    resumed = run(kind, "--resume", "true", folder="stopped")
    after = (tmp_path / "stopped/checkpoint-5/trainer_state.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # steps 1 to 5 did not run again
    assert losses(resumed) == losses(whole)
    assert all((tmp_path / "stopped" / name).is_file() for name in ("adapter_model.safetensors", "adapter_config.json"))
    first, second = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_prompt_is_kept(kind, run):
    trainer = run(kind, "--learning_rate", "30", "--num_train_epochs", "3")
    evaluations = losses(trainer, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), abs=ROUNDING)
    assert trainer.state.best_model_checkpoint is not None


def test_too_few_texts_are_refused(tiny_model_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "lake"}\n')
    with pytest.raises(ValueError, match="data: got 1 texts, accepted are 2 or more"):
        recipe.main([f"--model={tiny_model_folder}", f"--data={tmp_path}/texts.jsonl", f"--output_dir={tmp_path}"])


@pytest.mark.parametrize("line", ["lake", '"lake"', "[]", '{"input": "lake"}', '{"text": 3}', "3"])
def test_a_line_without_a_text_is_named(line):
    with pytest.raises(ValueError, match="in line 7, accepted is"):
        recipe.text_of(line, 7)
    assert recipe.text_of('{"text": "lake", "more": 1}', 7) == "lake"
