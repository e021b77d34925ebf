"""The recipe for transformers' Trainer: losses of the same trainer with F.kl_div on all logits, and its features."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from examples import trainer_distillation
from examples.trainer_distillation import DistillationTrainer
from tests.examples.conftest import QUIET, TEXTS, logged, time_ratio


class PlainTrainer(DistillationTrainer):
    """With logits, as one writes it with PyTorch alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        student = model(**inputs).logits[:, :-1][labels != -100].float()
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits[:, :-1][labels != -100].float()
        t = self.temperature
        loss = t**2 * functional.kl_div(
            functional.log_softmax(student / t, -1), functional.softmax(teacher / t, -1), reduction="sum"
        )
        loss = loss / (len(student) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


def trainer(kind, folders, output, *, temperature=1.0, **options) -> DistillationTrainer:
    """Batches of unequal texts: padding, and different numbers of tokens in accumulated batches."""
    student, teacher = folders
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [tokenizer(text) for text in TEXTS]
    defaults = {"per_device_train_batch_size": 3, "max_steps": 4, "learning_rate": 3e-3, "save_strategy": "no"}
    return kind(
        AutoModelForCausalLM.from_pretrained(student),
        TrainingArguments(str(output), **{**QUIET, **defaults, **options}),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        temperature=temperature,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows,
        eval_dataset=rows[:5],
    )


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_accumulation_steps": 2, "temperature": 2.0}, 1e-5),
        ({"activation_checkpointing": True}, 1e-5),
        ({"bf16": True}, 2e-2),  # plain logits are rounded to 8 bits there
        ({"eval_strategy": "steps", "eval_steps": 2}, 1e-5),
    ],
    ids=["accumulation", "checkpointing", "bf16", "evaluation"],
)
def test_losses_of_the_plain_trainer(folders, tmp_path: Path, options, tolerance) -> None:
    ours, plain = (trainer(kind, folders, tmp_path, **options) for kind in (DistillationTrainer, PlainTrainer))
    ours.train()
    plain.train()
    names = ["loss", "grad_norm", *(["eval_loss"] if "eval_strategy" in options else [])]
    for name in names:
        assert len(logged(ours, name)) >= 2
        torch.testing.assert_close(logged(ours, name), logged(plain, name), rtol=max(tolerance, 1e-3), atol=tolerance)
    assert logged(ours)[-1] < logged(ours)[0]


def test_a_compiled_model_gives_the_same(folders, tmp_path: Path) -> None:
    options = {"max_steps": 2, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 18}
    compiled = trainer(
        DistillationTrainer, folders, tmp_path, torch_compile=True, torch_compile_backend="eager", **options
    )
    eager = trainer(DistillationTrainer, folders, tmp_path, **options)
    compiled.train()
    eager.train()
    torch.testing.assert_close(logged(compiled), logged(eager), rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_the_large_batch(folders, tmp_path: Path) -> None:
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    accumulated = trainer(DistillationTrainer, folders, tmp_path, gradient_accumulation_steps=3, **options)
    large = trainer(DistillationTrainer, folders, tmp_path, per_device_train_batch_size=9, **options)
    accumulated.train()
    large.train()
    torch.testing.assert_close(logged(accumulated), logged(large), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_the_unbroken_one_and_the_best_model_is_loaded(folders, tmp_path: Path) -> None:
    options = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 3e-2,
    }
    unbroken = trainer(DistillationTrainer, folders, tmp_path, **options)
    unbroken.train()
    resumed = trainer(DistillationTrainer, folders, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logged(resumed), logged(unbroken), rtol=1e-6, atol=1e-7)
    best = logged(unbroken, "eval_loss").min().item()
    assert unbroken.state.best_metric == pytest.approx(best)
    assert unbroken.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_at_least_as_fast_as_the_plain_trainer_with_a_real_vocabulary(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    models = [LlamaForCausalLM(config) for _ in range(2)]
    ours, plain = (
        kind(models[0], TrainingArguments(str(tmp_path), **QUIET), teacher=models[1])
        for kind in (DistillationTrainer, PlainTrainer)
    )
    ids = torch.randint(0, 32768, (2, 128))

    def step(chosen: DistillationTrainer):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        return lambda: chosen.compute_loss(models[0], dict(inputs)).backward()

    assert time_ratio(step(ours), step(plain)) < 1


def test_runs_from_the_command_line(folders, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    recipe = Path(trainer_distillation.__file__)
    monkeypatch.setattr(sys, "argv", [recipe.name, *map(str, folders), str(tmp_path / "texts.txt"), str(tmp_path)])
    names = runpy.run_path(str(recipe), run_name="__main__")
    assert names["DistillationTrainer"] is not DistillationTrainer and (tmp_path / "model.safetensors").exists()


def test_main_distils_and_saves(folders, tmp_path: Path) -> None:
    done = trainer_distillation.main(*folders, TEXTS, tmp_path, num_train_epochs=2, learning_rate=3e-3, **QUIET)
    assert logged(done)[-1] < logged(done)[0]
    assert (tmp_path / "model.safetensors").exists()


def test_a_prompt_of_peft_is_put_in_front(folders, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    prompted = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    chosen = DistillationTrainer(prompted, TrainingArguments(str(tmp_path), **QUIET), teacher=teacher)
    ids = torch.randint(3, 300, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss = chosen.compute_loss(prompted, {**inputs, "labels": ids})
    log_q = functional.log_softmax(prompted(**inputs).logits[:, 4:-1], -1).flatten(0, 1)
    p = functional.softmax(teacher(**inputs).logits[:, :-1], -1).flatten(0, 1)
    torch.testing.assert_close(loss, functional.kl_div(log_q, p, reduction="batchmean"), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert prompted.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_a_model_in_distributed_data_parallel_gives_the_same_gradients(folders, tmp_path: Path) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    chosen = DistillationTrainer(student, TrainingArguments(str(tmp_path), **QUIET), teacher=teacher)
    ids = torch.randint(3, 300, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    chosen.compute_loss(student, dict(inputs)).backward()
    expected = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        chosen.compute_loss(DistributedDataParallel(student), dict(inputs)).backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([parameter.grad for parameter in student.parameters()], expected)


def test_other_heads_are_refused_before_training(folders, tmp_path: Path) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    student.lm_head.bias = torch.nn.Parameter(torch.zeros(300))
    with pytest.raises(ValueError, match="heads without a bias"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path), **QUIET), teacher=teacher)


def test_too_few_texts_are_refused(folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="texts: got 1, accepted are 2 or more"):
        trainer_distillation.main(*folders, ["the cat"], tmp_path)
