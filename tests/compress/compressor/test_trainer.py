"""The training of a compressor: its gradient, its draws, and a resumed run with the bits of an unbroken one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt_kernels.compress.compressor.compressor import Compressor
from softprompt_kernels.compress.compressor.lessons import Lesson
from softprompt_kernels.compress.compressor.trainer import CompressorTrainer, Draws
from softprompt_kernels.compress.distill.checkpoint import Checkpoints
from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import Schedule
from softprompt_kernels.compress.sources.sequences import Batch
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import head_of

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Compressor]
DRAWS = Draws(contexts=2, queries=2, segments=2, backprop_segments=2, micro_batch_size=None, seed=0)


def make_trainer(compressor: Compressor, lessons: list[Lesson], draws: Draws = DRAWS, **options: Any):
    objective = options.pop("objective", None) or Objective("kl", head_of(compressor.model))
    rate = options.pop("learning_rate", 1e-2)
    return CompressorTrainer(compressor, lessons, objective, Schedule(4, rate, 1), draws, **options)


def gradients(compressor: Compressor) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in compressor.named_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_falls_and_the_model_stays(make_compressor: Make, lessons: list[Lesson], rank: int) -> None:
    compressor = make_compressor(rank)
    frozen = {n: p.clone() for n, p in compressor.model.named_parameters() if "lora" not in n}
    trainer = make_trainer(compressor, lessons, replace(DRAWS, contexts=3, segments=1), learning_rate=0.05)
    losses = [trainer.train_step().loss for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in compressor.model.named_parameters() if "lora" not in n)
    assert trainer.rates["summary"] == 1
    assert all(rate == 1e-3 / 0.05 for name, rate in trainer.rates.items() if name != "summary")


@pytest.mark.parametrize("weights", ["uniform", "entropy"])
def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_step(
    make_compressor: Make, make_teacher: Any, assignments: Any, weights: Any
) -> None:
    from softprompt_kernels.compress import SilentReporter

    compressor = make_compressor(segment_tokens=32)
    objective = Objective("kl", head_of(compressor.model), token_weights=weights)
    lessons = make_teacher().lessons(assignments, evaluated=False, reporter=SilentReporter(), description="")
    draws = replace(DRAWS, contexts=3, segments=1)
    trainer = make_trainer(compressor, lessons, draws, objective=objective)
    loss, tokens = trainer.accumulate()
    found = gradients(compressor)["summary"]
    total, weight = torch.zeros(()), 0.0
    compressor.summary.grad = None
    for lesson in lessons:  # by hand: one context and one query at a time
        with compressor.reading():
            prefix = compressor.read([lesson.ids], [[len(lesson.ids)]], 1)
        for number, example in enumerate(lesson.examples):
            batch = Batch.of([example], torch.device("cpu"))
            hidden = batch.hidden(compressor.model, prefix)
            summed = objective.loss(hidden, batch.labels, [number], lesson.targets)
            total, weight = total + summed.loss, weight + summed.weight
    (total / weight).backward()
    assert tokens == sum(example.targets for lesson in lessons for example in lesson.examples)
    assert loss == pytest.approx(float((total / weight).detach()), rel=1e-5)
    torch.testing.assert_close(found, gradients(compressor)["summary"], rtol=1e-3, atol=1e-6)


def test_what_is_kept_of_a_context_does_not_depend_on_the_names_of_others(make_teacher: Any, assignments: Any) -> None:
    from softprompt_kernels.compress import SilentReporter

    teacher = make_teacher()
    named = replace(assignments[1], name="evaluated-one")
    for assignment, evaluated in ((named, False), (assignments[0], True)):
        teacher.lessons([assignment], evaluated=evaluated, reporter=SilentReporter(), description="")
    assert teacher._stored(named, False) is not None


def test_micro_batches_have_the_gradient_of_the_batch(make_compressor: Make, lessons: list[Lesson]) -> None:
    compressor = make_compressor(2)
    results = []
    for size in (None, 1):
        trainer = make_trainer(compressor, lessons, replace(DRAWS, micro_batch_size=size))
        results.append((trainer.accumulate()[0], gradients(compressor)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-6)


def test_steps_draw_all_contexts_and_random_cuts(make_compressor: Make, lessons: list[Lesson]) -> None:
    trainer = make_trainer(make_compressor(), lessons, replace(DRAWS, contexts=1, segments=3))
    drawn = [trainer._contexts_at(step)[0] for step in range(6)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == [0, 1, 2]
    import random

    cuts = {tuple(trainer._segments([lessons[0].ids], random.Random(i))[0]) for i in range(40)}
    assert all(sum(cut) == 20 and max(cut) <= 16 for cut in cuts), "20 tokens need two segments of at most 16"
    assert {len(cut) for cut in cuts} == {2, 3}
    assert len(cuts) > 10


@pytest.mark.parametrize("rank", [0, 2])
def test_a_resumed_training_has_the_bits_of_an_unbroken_one(
    make_compressor: Make, lessons: list[Lesson], tmp_path: Path, rank: int
) -> None:
    def state(trainer: CompressorTrainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.named.items()} | {
            f"best {name}": tensor for name, tensor in trainer.best.items()
        }

    compressor = make_compressor(rank)
    unbroken = make_trainer(compressor, lessons)
    start = {name: p.detach().clone() for name, p in unbroken.named.items()}
    checkpoints = Checkpoints(tmp_path / "checkpoint.safetensors", "run")
    for step in range(4):
        unbroken.train_step()
        unbroken.judged([0.5, 0.4, 0.6, 0.7][step])
        if step == 1:
            unbroken.save(checkpoints)
    expected = state(unbroken)
    with torch.no_grad():
        for name, parameter in unbroken.named.items():
            parameter.copy_(start[name])
    resumed = make_trainer(compressor, lessons)
    assert resumed.load(Checkpoints(tmp_path / "checkpoint.safetensors", "run"))
    assert (resumed.step, resumed.best_kl, resumed.best_step, resumed.judged_step) == (2, 0.4, 2, 2)
    for step in range(2, 4):
        resumed.train_step()
        resumed.judged([0.5, 0.4, 0.6, 0.7][step])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed).items())
    assert not torch.equal(resumed.named["summary"], resumed.best["summary"])
    resumed.take_best()
    assert torch.equal(resumed.named["summary"], resumed.best["summary"])
    with pytest.raises(SoftPromptError, match="belongs to another run"):
        resumed.load(Checkpoints(tmp_path / "checkpoint.safetensors", "other"))


def test_a_loss_that_is_not_finite_changes_nothing(make_compressor: Make, lessons: list[Lesson]) -> None:
    compressor = make_compressor()
    with torch.no_grad():
        compressor.summary[0, 0] = float("inf")
    before = compressor.summary.detach().clone()
    with pytest.raises(SoftPromptError, match="learning_rate: at step 1 the loss is nan"):
        make_trainer(compressor, lessons).train_step()
    assert torch.equal(compressor.summary, before)
