"""Every objective against its formula in float64, with the model's own head."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.sources.sequences import Batch, Example
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.prompts import Prefix

CPU = torch.device("cpu")
CHOSEN = [4, 0, 3]
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "kl": ({"name": "kl"}, "moments"),
    "kl at temperature 2": ({"name": "kl", "temperature": 2.0}, "moments"),
    "kl with a softcap": ({"name": "kl", "softcap": 3.0}, "hidden"),
    "kl with a bias": ({"name": "kl", "bias": True}, "moments"),
    "kl and labels": ({"name": "kl", "nll_weight": 0.3}, "moments"),
    "kl, all labels": ({"name": "kl", "nll_weight": 1.0}, None),
    "reverse kl": ({"name": "reverse_kl"}, "hidden"),
    "reverse kl, temperature, bias": ({"name": "reverse_kl", "temperature": 0.5, "bias": True}, "hidden"),
    "jsd": ({"name": "jsd"}, "hidden"),
    "jsd with beta": ({"name": "jsd", "beta": 0.2, "softcap": 3.0}, "hidden"),
    "nll": ({"name": "nll"}, None),
    "nll with a bias": ({"name": "nll", "bias": True}, None),
}


def expected_loss(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """The loss by its formula, summed over tokens, in float64."""
    head = replace(
        objective.head,
        weight=objective.head.weight.double(),
        bias=None if objective.head.bias is None else objective.head.bias.double(),
    )
    t, beta, weight = objective.temperature, objective.beta, objective.label_weight
    q, p = ((head.logits(rows) / t).log_softmax(-1) for rows in (student, teacher))
    if objective.name == "reverse_kl":
        divergence = (q.exp() * (q - p)).sum()
    elif objective.name == "jsd":
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        divergence = beta * (p.exp() * (p - m)).sum() + (1 - beta) * (q.exp() * (q - m)).sum()
    else:
        divergence = (p.exp() * (p - q)).sum()
    nll = -q.gather(1, labels[:, None]).sum()
    return (1 - weight) * divergence * t * t + weight * nll


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_formula(
    case: str, make_targets: Any, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    options, form = CASES[case]
    options = dict(options)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(2)) if options.pop("bias", False) else None
    head = replace(head_of(model), bias=bias, softcap=options.pop("softcap", None))
    objective = Objective(head=head, **options)
    assert objective.form == form
    targets = None
    if form is not None:
        targets = make_targets(form=form, temperature=objective.temperature, head=head)
    batch = Batch.of([examples[i] for i in CHOSEN], CPU)
    student = batch.hidden(model, context.slice(0, 5)).requires_grad_()
    loss, weight = objective.loss(student, batch.labels, CHOSEN, targets)
    assert weight == len(student)
    (gradient,) = torch.autograd.grad(loss, student)
    rows = student.detach().double().requires_grad_()
    expected = expected_loss(rows, batch.hidden(model, context).double(), batch.labels, objective)
    (expected_gradient,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=0, atol=2e-5 * float(expected_gradient.abs().max())
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "forward"}, "objective: got 'forward'"),
        ({"name": "jsd", "nll_weight": 0.5}, "nll_weight: got 0.5 with jsd"),
        ({"name": "reverse_kl", "nll_weight": 0.5}, "nll_weight: got 0.5 with reverse_kl"),
        ({"name": "kl", "nll_weight": 0.5, "temperature": 2.0}, "loss_temperature: got 2.0 with labels"),
        ({"name": "nll", "temperature": 2.0}, "loss_temperature: got 2.0 with labels"),
        ({"name": "nll", "softcap": 5.0}, "head has a softcap"),
        ({"name": "kl", "nll_weight": 0.5, "softcap": 5.0}, "head has a softcap"),
    ],
)
def test_unsupported_mixtures_are_refused(options: dict[str, Any], reason: str) -> None:
    options = dict(options)
    head = Head(torch.zeros(3, 2), softcap=options.pop("softcap", None))
    with pytest.raises(SoftPromptError, match=reason):
        Objective(head=head, **options)


def test_the_loss_of_a_perfect_student_is_zero(
    tmp_path: Path, make_targets: Any, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    head = head_of(model)
    rows = Batch.of(examples, CPU).hidden(model, context)
    for name in ("kl", "reverse_kl", "jsd"):
        objective = Objective(name, head)
        targets = make_targets(form=objective.form, folder=tmp_path / name)
        labels = torch.zeros(len(rows), dtype=torch.int64)
        loss = float(objective.loss(rows, labels, range(len(examples)), targets).loss)
        assert math.isclose(loss, 0, abs_tol=2e-5 * len(rows))
