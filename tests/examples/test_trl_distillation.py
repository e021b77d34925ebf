"""The recipe for TRL: TRL still refuses PEFT's prompts, and its own loss has the recipe's value."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from examples import trl_distillation
from examples.trl_distillation import PromptDistillationTrainer
from tests.examples.conftest import QUIET, logged, time_ratio

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids are not supported")
PROMPTS = ["the cat", "a dog ran to the red", "no"] * 7  # more than 4 steps: TRL shuffles a resumed epoch anew
OPTIONS = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 3e-2,
    "bf16": False,
    "save_strategy": "no",
}


class PlainTrainer(PromptDistillationTrainer):
    """With all logits, as one writes it with PyTorch alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            num_items_in_batch = inputs["num_items_in_batch"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        answers, counted = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
        with torch.no_grad():
            teacher = self.teacher_model(input_ids=ids, attention_mask=mask).logits
        student = model(input_ids=ids, attention_mask=mask).logits
        log_q, log_p = (
            functional.log_softmax(logits[:, -answers - 1 : -1][counted] / self.temperature, -1)
            for logits in (student, teacher)
        )
        if self.beta == 0:
            loss = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        elif self.beta == 1:
            loss = functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
        else:
            log_m = torch.log(self.beta * log_p.exp() + (1 - self.beta) * log_q.exp())
            loss = self.beta * functional.kl_div(log_m, log_p, reduction="sum", log_target=True)
            loss = loss + (1 - self.beta) * functional.kl_div(log_m, log_q, reduction="sum", log_target=True)
        loss = loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, None) if return_outputs else loss


def train(kind, folders, output, monkeypatch, **options):
    monkeypatch.setattr(trl_distillation, "PromptDistillationTrainer", kind)
    return trl_distillation.main(*folders, PROMPTS, output, 4, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0, "gradient_accumulation_steps": 2},
        {"beta": 0.3, "temperature": 2.0},
        {"beta": 1.0, "gradient_checkpointing": False},
    ],
    ids=["forward", "jsd", "reverse"],
)
def test_losses_of_the_plain_trainer(folders, tmp_path: Path, monkeypatch, options) -> None:
    ours, plain = (
        train(kind, folders, tmp_path, monkeypatch, **options) for kind in (PromptDistillationTrainer, PlainTrainer)
    )
    for name in ("loss", "grad_norm"):
        assert len(logged(ours, name)) == 3
        torch.testing.assert_close(logged(ours, name), logged(plain, name), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_value_of_trls_own_loss(folders, tmp_path: Path, beta, kind) -> None:
    """On one batch with padding on both sides, and for both kinds of prompt."""
    from datasets import Dataset
    from peft import PrefixTuningConfig, PromptTuningConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    config = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig}[kind]
    trainer = PromptDistillationTrainer(
        *(AutoModelForCausalLM.from_pretrained(folder) for folder in folders),
        DistillationConfig(
            str(tmp_path), **{**OPTIONS, "beta": beta, "temperature": 2.0, "gradient_checkpointing": False}
        ),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(folders[0], padding_side="left"),
        peft_config=config(task_type="CAUSAL_LM", num_virtual_tokens=4),
    )
    inputs = {
        "prompt_ids": torch.randint(3, 300, (2, 5)),
        "prompt_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "completion_ids": torch.randint(3, 300, (2, 4)),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    counted, heads = inputs["completion_mask"].bool(), []
    for model in (trainer.model, trainer.teacher_model):
        head = trainer.head if model is trainer.model else trainer.teacher_head
        read: list[torch.Tensor] = []
        module = model.get_output_embeddings()
        hook = module.register_forward_pre_hook(lambda _, arguments, read=read: read.append(arguments[0]))
        model(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        )
        hook.remove()
        heads.append((read[0][:, -5:-1][counted].detach(), head.weight, None))
    rows, _ = ChunkedDivergenceFunction.apply(*heads[0], *heads[1], beta, 2.0, 1.0, None, 1.0, None)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), rows.mean(), rtol=1e-4, atol=1e-7)


def test_trl_refuses_the_prompt_that_the_recipe_trains(folders, tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import PromptTuningConfig
    from transformers import AutoModelForCausalLM
    from trl import DistillationConfig, DistillationTrainer

    with pytest.raises(ValueError, match="not supported"):
        DistillationTrainer(
            AutoModelForCausalLM.from_pretrained(folders[0]),
            str(folders[1]),
            DistillationConfig(str(tmp_path), **OPTIONS),
            Dataset.from_dict({"prompt": PROMPTS}),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        )


def test_only_the_prompt_is_trained_saved_and_resumed(folders, tmp_path: Path, monkeypatch) -> None:
    from peft import AutoPeftModelForCausalLM

    every = {f"{name}_{what}": v for name in ("save", "eval") for what, v in (("strategy", "steps"), ("steps", 2))}
    options = {"max_steps": 4, "beta": 0.0, "load_best_model_at_end": True, **every}
    unbroken = train(PromptDistillationTrainer, folders, tmp_path, monkeypatch, **options)
    names = [name for name, parameter in unbroken.model.named_parameters() if parameter.requires_grad]
    assert names == ["prompt_encoder.default.embedding.weight"]
    assert unbroken.callback_handler.model is unbroken.model
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path).prompt_encoder.default.embedding.weight
    torch.testing.assert_close(saved, unbroken.model.prompt_encoder.default.embedding.weight)

    class Resumed(PromptDistillationTrainer):
        def train(self):
            return super().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    resumed = train(Resumed, folders, tmp_path, monkeypatch, **options)
    for name in ("loss", "eval_loss"):
        assert len(logged(unbroken, name)) >= 2
        torch.testing.assert_close(logged(resumed, name), logged(unbroken, name), rtol=1e-5, atol=1e-6)
    best = tmp_path / f"checkpoint-{unbroken.state.best_global_step}"
    assert unbroken.state.best_metric == pytest.approx(logged(unbroken, "eval_loss").min().item())
    of_best = AutoPeftModelForCausalLM.from_pretrained(best).prompt_encoder.default.embedding.weight
    torch.testing.assert_close(of_best, unbroken.model.prompt_encoder.default.embedding.weight)


def test_runs_from_the_command_line(folders, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = Path(trl_distillation.__file__)
    monkeypatch.setattr(sys, "argv", [recipe.name, *map(str, folders), str(tmp_path / "prompts.txt"), str(tmp_path)])
    source = recipe.read_text().replace("logging_steps=10", "max_steps=1, max_completion_length=4")
    (tmp_path / recipe.name).write_text(source)
    runpy.run_path(str(tmp_path / recipe.name), run_name="__main__")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_loss_is_at_least_as_fast_as_trls_with_a_real_vocabulary() -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    from softprompt_kernels import LinearKLDivLoss

    student, teacher = torch.randn(2, 128, 64)
    student.requires_grad_()
    weight = torch.randn(32768, 64)

    def trl():
        ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 1.0, 1.0, 1.0, None, 1.0, None)[
            0
        ].mean().backward()

    assert time_ratio(lambda: LinearKLDivLoss("jsd", 1.0)(student, weight, teacher).backward(), trl) < 1


def test_too_few_prompts_are_refused(folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: got 1, accepted are 2 or more"):
        trl_distillation.main(*folders, ["the cat"], tmp_path)
