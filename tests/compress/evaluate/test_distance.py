"""The figures of an evaluation against their formulas, and the refusal of queries that need no context."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.evaluate import distance as module
from softprompt_kernels.compress.evaluate.distance import Distance, check_context_matters, distance, measure, summary
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.prompts import Prefix


def rows(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 16, generator=generator).split([1, 2, count - 3]))


@pytest.fixture(params=["linear", "bias and softcap"])
def head(request: pytest.FixtureRequest) -> Head:
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 16, generator=generator))
    if request.param == "linear":
        return head
    return replace(head, bias=torch.randn(50, generator=generator), softcap=4.0)


def test_equal_hidden_states_have_distance_zero(head: Head) -> None:
    same = rows(9, 1)
    assert distance(head, same, same) == Distance(0.0, 1.0, 0.0, 9)


def test_figures_equal_their_formulas(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)
    student, teacher = rows(10, 1), [s + 0.3 * t for s, t in zip(rows(10, 1), rows(10, 2), strict=True)]
    double = replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
    q, p = (double.logits(torch.cat(part).double()).log_softmax(-1) for part in (student, teacher))
    found = distance(head, student, teacher)
    assert found.tokens == 10
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < found.top1_agreement < 1
    gap = -(q.exp() * q).sum(-1).mean() + (p.exp() * p).sum(-1).mean()
    assert found.entropy_gap == pytest.approx(float(gap), abs=1e-5)


def test_a_vocabulary_entry_of_probability_zero_gives_no_nan() -> None:
    head = Head(torch.eye(3), bias=torch.tensor([0.0, 0.0, -torch.inf]))
    same = [torch.tensor([[1.0, 2.0, 3.0]])]
    found = distance(head, same, same)
    assert (found.kl, found.entropy_gap) == (0.0, 0.0)


def test_every_student_is_measured(model: PreTrainedModel, context: Prefix, examples: list[Example]) -> None:
    students = {"none": None, "half": context.slice(0, 10), "all": context}
    found = measure(model, context, students, examples, SilentReporter(), "some")
    assert found["all"].kl == pytest.approx(0, abs=1e-6)
    assert found["all"].top1_agreement == 1
    assert found["none"].kl > 0.01
    assert found["half"].kl not in (found["none"].kl, found["all"].kl)
    assert {value.tokens for value in found.values()} == {sum(example.targets for example in examples)}
    assert head_of(model).weight.grad is None


def test_the_summary_holds_every_figure() -> None:
    none, prompt, truncated = Distance(2.0, 0.25, 0.5, 40), Distance(0.5, 0.75, -0.1, 40), Distance(1.5, 0.5, 0.2, 40)
    assert summary({"none": none, "truncated": truncated, "prompt": prompt}) == {
        "kl_none": 2.0,
        "kl_truncated": 1.5,
        "kl_prompt": 0.5,
        "recovered": 0.75,
        "top1_agreement": 0.75,
        "top1_agreement_none": 0.25,
        "top1_agreement_truncated": 0.5,
        "entropy_gap": -0.1,
        "tokens": 40,
    }


@pytest.mark.parametrize("kl", [0.0, -1e-9, 1e-3])
def test_a_context_that_does_not_matter_is_refused(kl: float) -> None:
    with pytest.raises(SoftPromptError, match="context does not matter for these queries"):
        check_context_matters(kl)
    with pytest.raises(SoftPromptError, match="context does not matter"):
        summary({"none": Distance(kl, 1.0, 0.0, 4), "prompt": Distance(0.0, 1.0, 0.0, 4)})
    check_context_matters(1.1e-3)


def test_a_divergence_that_is_not_a_number_is_named() -> None:
    with pytest.raises(SoftPromptError, match="dtype: the KL without context is not a number"):
        check_context_matters(float("nan"))
