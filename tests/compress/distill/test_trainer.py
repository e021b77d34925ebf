"""The trainer: what a step computes, that the seed determines a run, and that a run can be resumed after any step."""

import copy
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from softprompt_kernels.compress.distill.checkpoint import Checkpoints
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.relative_adamw import RelativeAdamW
from softprompt_kernels.compress.distill.trainer import Schedule, StepReport, Trainer
from softprompt_kernels.compress.sources.sequences import Batch, Example, total_targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, head_of, prefix_of, prepare
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix

CPU = torch.device("cpu")
MakeTrainer = Callable[..., Trainer]
FullDisk = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["kv", "embedding"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_trainer(model: PreTrainedModel, context: Prefix, examples: list[Example], make_targets: Any) -> MakeTrainer:
    def call(kind: str = "kv", examples: list[Example] = examples, **options: Any) -> Trainer:
        frozen = options.pop("frozen_tokens", 1)
        prompt: KVPrompt | EmbeddingPrompt
        if kind == "kv":
            prompt = KVPrompt.from_prefix(context.slice(0, 4), frozen_tokens=frozen)
        else:
            rows = model.get_input_embeddings().weight[10:14].clone()
            prompt = EmbeddingPrompt(rows, frozen_tokens=frozen)
        objective = Objective("kl", head_of(model))
        targets = make_targets(examples=examples)
        schedule = Schedule(options.pop("steps", 6), options.pop("learning_rate", 0.02), options.pop("warmup", 1))
        settings = {"batch_size": 3, "seed": 7} | options
        return Trainer(model, prompt, examples, targets, objective, schedule, **settings)

    return call


def reports_of(trainer: Trainer) -> list[StepReport]:
    reports: list[StepReport] = []
    trainer.run(reports.append)
    return [replace(report, seconds=0.0) for report in reports]


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in trainer.prompt.state_dict().items()}
    for index, parameter in enumerate(trainer.parameters):
        state |= {f"{index}.{name}": value.clone() for name, value in trainer.optimizer.state[parameter].items()}
    return state


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# One step


def test_loss_and_gradient_are_the_mean_over_all_tokens_of_the_batch(make_trainer: MakeTrainer, kind: str) -> None:
    trainer, chosen = make_trainer(kind), [5, 0, 3]
    loss = trainer.accumulate(chosen)
    found = [parameter.grad.clone() for parameter in trainer.parameters]
    # Each sequence alone, with autograd through the prompt.
    total = torch.zeros((), dtype=torch.float64)
    for index in chosen:
        batch = Batch.of([trainer.examples[index]], CPU)
        hidden = batch.hidden(trainer.model, prefix_of(trainer.model, trainer.prompt))
        total = total + trainer.objective.loss(hidden, batch.labels, [index], trainer.targets).loss.double()
    mean = total / total_targets([trainer.examples[i] for i in chosen])
    assert loss == pytest.approx(float(mean.detach()), rel=1e-5)
    for gradient, expected in zip(found, torch.autograd.grad(mean, trainer.parameters), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"name": "kl"}, "moments"),
        ({"name": "nll"}, None),
        ({"name": "jsd", "beta": 0.3}, "hidden"),
        ({"name": "kl", "nll_weight": 0.4}, "moments"),
        ({"name": "kl", "token_weights": "entropy"}, "moments"),
        ({"name": "jsd", "token_weights": "student"}, "hidden"),
    ],
    ids=str,
)
def test_accumulated_gradients_equal_those_of_the_whole_batch(
    make_trainer: MakeTrainer, make_targets: Any, options: dict[str, Any], form: str | None
) -> None:
    results = []
    for micro in (None, 1, 3):
        trainer = make_trainer(batch_size=7, micro_batch_size=micro)
        trainer.objective = Objective(head=head_of(trainer.model), **options)
        assert trainer.objective.form == form
        trainer.targets = None if form is None else make_targets(form=form)
        loss = trainer.accumulate([6, 0, 3, 1, 5, 2, 4])
        results.append((loss, [parameter.grad.clone() for parameter in trainer.parameters]))
    (whole, expected), *parts = results
    for loss, found in parts:
        assert loss == pytest.approx(whole, rel=1e-5)
        for gradient, of_whole in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, of_whole, rtol=0, atol=1e-5 * float(of_whole.abs().max()))


def test_frozen_tokens_never_change_and_the_others_do(make_trainer: MakeTrainer, kind: str) -> None:
    trainer = make_trainer(kind, frozen_tokens=2, weight_decay=0.1)
    before = {name: value.clone() for name, value in trainer.prompt.state_dict().items()}
    prefix = prefix_of(trainer.model, trainer.prompt).detach()
    reports_of(trainer)
    for name, value in trainer.prompt.state_dict().items():
        assert torch.equal(value, before[name]) == ("frozen" in name), name
    trained = prefix_of(trainer.model, trainer.prompt).detach()
    for (old, _), (new, _) in zip(prefix.layers, trained.layers, strict=True):
        assert torch.equal(old[:, :, :2], new[:, :, :2])


def test_the_model_is_not_changed(make_trainer: MakeTrainer, kind: str) -> None:
    trainer = make_trainer(kind)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    reports_of(trainer)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_prompt_without_trainable_tokens_is_refused(make_trainer: MakeTrainer, kind: str) -> None:
    with pytest.raises(SoftPromptError, match="frozen_tokens: got all tokens"):
        make_trainer(kind, frozen_tokens=4)


def test_gradients_are_clipped_to_the_norm(make_trainer: MakeTrainer) -> None:
    plain, clipped = make_trainer(), make_trainer(max_grad_norm=1e-3)
    norm = plain.train_step().grad_norm
    assert norm > 1e-3
    assert clipped.train_step().grad_norm == norm, "the norm before clipping is reported"
    assert float(torch.cat([p.grad.flatten() for p in clipped.parameters]).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert float(torch.cat([p.grad.flatten() for p in plain.parameters]).norm()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_or_gradient_that_is_not_finite_ends_training_before_the_prompt_changes(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    for damaged in ("loss", "gradient"):
        trainer = make_trainer()
        trainer.train_step()
        before = state_of(trainer)
        original = trainer.accumulate

        def accumulate(
            chosen: Any, damaged: str = damaged, trainer: Trainer = trainer, original: Any = original
        ) -> float:
            loss = original(chosen)
            if damaged == "loss":
                return value
            trainer.parameters[0].grad[0, 0, 0] = value
            return loss

        monkeypatch.setattr(trainer, "accumulate", accumulate)
        with pytest.raises(SoftPromptError, match="learning_rate: at step 2"):
            trainer.train_step()
        assert_same(state_of(trainer), before)
        assert trainer.step == 1


# Many steps


@pytest.mark.parametrize(("batch_size", "count"), [(3, 7), (7, 7), (2, 7), (5, 7), (1, 3)])
def test_every_epoch_visits_each_example_once(make_trainer: MakeTrainer, batch_size: int, count: int) -> None:
    trainer = make_trainer(batch_size=batch_size, examples=(make_trainer().examples * 2)[:count])
    drawn = [index for step in range(4 * count) for index in trainer.batch_at(step)]
    epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert len(drawn) == 4 * count * batch_size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "epochs have different orders"


def test_a_batch_is_never_larger_than_the_set(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(batch_size=100)
    assert sorted(trainer.batch_at(0)) == sorted(trainer.batch_at(3)) == list(range(7))


def test_the_order_depends_on_the_seed(make_trainer: MakeTrainer) -> None:
    orders = [[tuple(make_trainer(seed=seed).batch_at(step)) for step in range(4)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_the_learning_rate_warms_up_and_decays_along_a_cosine() -> None:
    schedule = Schedule(10, 2.0, 4)
    rates = [schedule.at(step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:] == pytest.approx([1 + math.cos(math.pi * step / 6) for step in range(1, 6)])
    assert schedule.at(10) == pytest.approx(0)
    assert Schedule(1, 2.0, 0).at(0) == 2.0
    assert Schedule(3, 2.0, 3).at(2) == pytest.approx(1.5)


def test_every_step_uses_the_learning_rate_of_the_schedule(make_trainer: MakeTrainer) -> None:
    reports = reports_of(make_trainer(steps=5))
    assert [report.learning_rate for report in reports] == [Schedule(5, 0.02, 1).at(step) for step in range(5)]
    tiny_rate = make_trainer(learning_rate=1e-30)
    before = tiny_rate.prompt.key.clone()
    tiny_rate.train_step()
    assert torch.equal(tiny_rate.prompt.key, before)


def test_training_lowers_the_loss(make_trainer: MakeTrainer, kind: str) -> None:
    losses = [report.loss for report in reports_of(make_trainer(kind, batch_size=7, steps=40, learning_rate=0.05))]
    assert losses[-1] < 0.6 * losses[0]


def test_two_runs_give_the_same_bits(make_trainer: MakeTrainer, kind: str) -> None:
    first, second = make_trainer(kind), make_trainer(kind)
    torch.manual_seed(1)
    reports = reports_of(first)
    torch.manual_seed(2)
    assert reports_of(second) == reports
    assert_same(state_of(first), state_of(second))


# Gradient checkpointing


def test_gradient_checkpointing_changes_nothing_even_where_the_model_has_dropout(examples: list[Example]) -> None:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5, attn_pdrop=0.5)
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(config).eval().requires_grad_(False)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model in (plain, checkpointed):
        prepare(model)
        prompt = KVPrompt.from_prefix(capture(model, torch.arange(5)[None]))
        trainer = Trainer(
            model, prompt, examples, None, Objective("nll", head_of(model)), Schedule(1, 0.1), batch_size=7
        )
        ran: list[int] = []
        handle = model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        loss = trainer.accumulate(range(7))
        handle.remove()
        gradients.append((loss, [parameter.grad for parameter in trainer.parameters], len(ran)))
        assert not any(module.training for module in model.modules())
    (expected_loss, expected, plain_calls), (loss, found, checkpointed_calls) = gradients
    assert (plain_calls, checkpointed_calls) == (1, 2), "with checkpointing, layers run again in the backward pass"
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=0, atol=1e-6 * float(expected_gradient.abs().max())
        )


# Checkpoints


@pytest.mark.parametrize("interrupted_at", [0, 1, 4, 6])
def test_a_resumed_run_gives_the_same_bits(
    make_trainer: MakeTrainer, kind: str, tmp_path: Path, interrupted_at: int
) -> None:
    uninterrupted, first = make_trainer(kind, weight_decay=0.01), make_trainer(kind, weight_decay=0.01)
    reports = reports_of(uninterrupted)
    before = [replace(first.train_step(), seconds=0.0) for _ in range(interrupted_at)]
    first.save(Checkpoints(tmp_path / "checkpoint", "me"))
    second = make_trainer(kind, weight_decay=0.01)
    second.load(Checkpoints(tmp_path / "checkpoint", "me"))
    assert (second.step, second.saved_step) == (interrupted_at, interrupted_at)
    assert before + reports_of(second) == reports
    assert_same(state_of(second), state_of(uninterrupted))


def test_resumed_training_does_not_change_the_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    first = make_trainer()
    first.train_step()
    first.save(Checkpoints(path, "me"))
    content = path.read_bytes()
    second = make_trainer()
    second.load(Checkpoints(path, "me"))
    reports_of(second)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "a changed bit"])
def test_a_damaged_checkpoint_is_refused_with_a_message(make_trainer: MakeTrainer, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint"
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(Checkpoints(path, "me"))
    content = path.read_bytes()
    changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    damages = {"truncated": content[:-5], "empty": b"", "text": b"not a checkpoint at all", "a changed bit": changed}
    path.write_bytes(damages[damage])
    with pytest.raises(SoftPromptError, match=r"checkpoint: .* cannot be read .*delete it to start over"):
        make_trainer().load(Checkpoints(path, "me"))


def test_a_checkpoint_of_another_run_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer().save(Checkpoints(tmp_path / "checkpoint", "me"))
    trainer = make_trainer()
    before = state_of(trainer)
    with pytest.raises(SoftPromptError, match="belongs to another run"):
        trainer.load(Checkpoints(tmp_path / "checkpoint", "you"))
    assert_same(state_of(trainer), before)


def test_a_full_disk_keeps_the_last_checkpoint(make_trainer: MakeTrainer, tmp_path: Path, full_disk: FullDisk) -> None:
    path = tmp_path / "checkpoint"
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(Checkpoints(path, "me"))
    content = path.read_bytes()
    trainer.train_step()
    with full_disk(), pytest.raises(OSError, match=re.escape(str(path))):
        trainer.save(Checkpoints(path, "me"))
    assert path.read_bytes() == content
    assert trainer.saved_step == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_an_interrupted_update_is_not_saved(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(Checkpoints(path, "me"))
    content, update = path.read_bytes(), trainer.optimizer.step

    def interrupted() -> None:
        update()
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_step()
    trainer.save(Checkpoints(path, "me"))
    assert path.read_bytes() == content
    assert trainer.saved_step == 1


@pytest.mark.parametrize(
    ("kind", "relative", "expected"),
    [("kv", True, RelativeAdamW), ("kv", False, torch.optim.AdamW), ("embedding", True, torch.optim.AdamW)],
)
def test_only_kv_prompts_have_relative_rates(
    make_trainer: MakeTrainer, kind: str, relative: bool, expected: type
) -> None:
    assert type(make_trainer(kind, relative=relative).optimizer) is expected
