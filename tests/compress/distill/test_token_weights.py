"""Weights of tokens: their formulas, and that neither micro-batches nor padding change the mean that they give."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.distill.trainer import Schedule, Trainer
from softprompt_kernels.compress.sources.sequences import Batch, Example
from softprompt_kernels.compress.teacher.moments_cache import Targets
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.prompts import KVPrompt, Prefix

CPU = torch.device("cpu")
CHOSEN = [3, 0, 6]
CASES: list[dict[str, Any]] = [
    {"name": "kl", "token_weights": "entropy"},
    {"name": "kl", "token_weights": "entropy", "temperature": 2.0},
    {"name": "kl", "token_weights": "entropy", "nll_weight": 0.4},
    {"name": "kl", "token_weights": "student", "temperature": 2.0},
    {"name": "reverse_kl", "token_weights": "entropy", "temperature": 2.0},
    {"name": "jsd", "token_weights": "entropy", "softcap": 15.0},
    {"name": "jsd", "token_weights": "student"},
    {"name": "nll", "token_weights": "entropy"},
]


def objective_of(options: dict[str, Any], model: PreTrainedModel) -> Objective:
    """With logits five times as large, so that entropies differ."""
    options = dict(options)
    return Objective(head=replace(head_of(model), softcap=options.pop("softcap", None), logit_scale=5.0), **options)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_loss_is_weighted_by_the_formula(
    options: dict[str, Any], make_targets: Any, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    objective = objective_of(options, model)
    head, t = objective.head, objective.temperature
    targets = None
    if objective.form is not None:
        targets = make_targets(form=objective.form, temperature=t, head=head)
    batch = Batch.of([examples[i] for i in CHOSEN], CPU)
    student = batch.hidden(model, context.slice(0, 5)).requires_grad_()
    found, weight = objective.loss(student, batch.labels, CHOSEN, targets)
    losses = objective.losses(student, batch.labels, CHOSEN, targets)
    if objective.token_weights == "entropy":
        teacher = (head.logits(batch.hidden(model, context)).double() / t).log_softmax(-1)
        weights = -(teacher.exp() * teacher).sum(-1)
    else:
        weights = 1 - torch.exp(-losses.detach().double() / t**2)
    assert float(weights.max()) > 1.2 * float(weights.min()), "tokens have different weights"
    assert weight == pytest.approx(float(weights.sum()), rel=1e-5)
    expected = (losses.double() * weights).sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("options", [CASES[0], CASES[6], CASES[7]], ids=str)
def test_micro_batches_do_not_change_the_weighted_mean(
    options: dict[str, Any], make_targets: Any, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    objective = objective_of(options, model)
    targets = make_targets(form=objective.form, head=objective.head)

    def gradient(micro: int | None) -> tuple[float, torch.Tensor]:
        prompt = KVPrompt.from_prefix(context.slice(0, 4))
        settings = {"batch_size": 7, "micro_batch_size": micro}
        trainer = Trainer(model, prompt, examples, targets, objective, Schedule(1, 0.1), **settings)
        loss = trainer.accumulate(range(7))
        return loss, torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])

    def mean(chosen: list[int]) -> tuple[float, torch.Tensor]:
        prompt, batch = KVPrompt.from_prefix(context.slice(0, 4)), Batch.of([examples[i] for i in chosen], CPU)
        loss, weight = objective.loss(batch.hidden(model, prompt.prefix()), batch.labels, chosen, targets)
        gradients = torch.autograd.grad(loss / weight, [p for p in prompt.parameters() if p.numel()])
        return float(loss.detach()) / weight, torch.cat([gradient.flatten() for gradient in gradients])

    whole, expected = mean(list(range(7)))
    for micro in (None, 2):
        loss, found = gradient(micro)
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert max(abs(mean([i])[0] - whole) for i in range(7)) > 1e-3, "one sequence alone has another mean"


def test_tokens_without_any_weight_give_the_loss_0(
    make_targets: Any,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, objective = KVPrompt.from_prefix(context.slice(0, 4)), objective_of(CASES[0], model)
    trainer = Trainer(
        model, prompt, examples, make_targets(head=objective.head), objective, Schedule(1, 0.1), batch_size=2
    )
    monkeypatch.setattr(Targets, "entropy", lambda *_: torch.full((3,), -1e-7))  # what rounding may make of 0
    assert trainer.accumulate([1, 2]) == 0
    assert all(float(parameter.grad.abs().max()) == 0 for parameter in trainer.parameters)


@pytest.mark.parametrize("options", [{"name": "nll"}, {"name": "kl", "nll_weight": 0.2}], ids=str)
def test_a_loss_with_labels_has_no_weights_by_the_student(options: dict[str, Any]) -> None:
    with pytest.raises(SoftPromptError, match=r"token_weights: got student with .* does not say what the student has"):
        Objective(head=Head(torch.zeros(3, 2)), token_weights="student", **options)
