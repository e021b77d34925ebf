"""kl_div against sums of p log(p / q) in float64."""

import re

import pytest
import torch

from softprompt_kernels.kernels.problems.loss import DIVERGENCES
from softprompt_kernels.ops import kl_div


def agree(actual, expected, tolerance):
    """Within `tolerance` of float64."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 20, check_dtype=False)


def logits(rows=6, vocab=50, spread=2.0, dtype=torch.float64):
    return (torch.randn(rows, vocab, dtype=torch.float64) * spread).to(dtype)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_and_gradient_equal_the_oracle(kind, temperature, backend, precision, divergence_oracle):
    student, teacher = logits(dtype=precision.dtype).requires_grad_(), logits(dtype=precision.dtype)
    options = {"beta": 0.3, "temperature": temperature}
    rows = kl_div(student, teacher, divergence=kind, **options, reduction="none", backend=backend)
    expected = divergence_oracle(student, teacher, kind, **options)
    agree(rows, expected, precision.tolerance)
    grad_rows = torch.randn_like(rows)
    actual, wanted = (torch.autograd.grad(x, student, grad_rows.to(x.dtype))[0] for x in (rows, expected))
    agree(actual, wanted, precision.tolerance)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck(kind):
    student, teacher = logits(3, 7).requires_grad_(), logits(3, 7)

    def loss(student):
        return kl_div(
            student, teacher, divergence=kind, beta=0.7, temperature=1.5, reduction="none", backend="reference"
        )

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("spread", [2.0, 15.0], ids=["near", "far"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_composed_equals_reference_near_and_far(kind, spread):
    """Far logits differ by more than MAX_DIFFERENCE: their rows are computed by the reference."""
    student, teacher = logits(spread=spread).requires_grad_(), logits(spread=spread)
    found = []
    for backend in ("reference", "composed"):
        rows = kl_div(student, teacher, divergence=kind, reduction="none", backend=backend)
        found.append((rows, *torch.autograd.grad(rows.sum(), student)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("distance", [0.05, 1.5e-3], ids=["1e-3", "1e-6"])
def test_loss_keeps_relative_accuracy_in_fp32_as_it_goes_to_zero(kind, distance, backend, divergence_oracle):
    teacher = logits(16, 3000, 3.0, torch.float32)
    student = teacher + distance * torch.randn_like(teacher) + 4.0  # a constant changes no distribution
    rows = kl_div(student, teacher, divergence=kind, reduction="none", backend=backend)
    expected = divergence_oracle(student, teacher, kind)
    assert 1e-8 < expected.mean() < 2e-3
    torch.testing.assert_close(rows.double(), expected, rtol=1e-3, atol=0)


def test_weights_reductions_and_skipped_rows(backend, precision, divergence_oracle):
    student, teacher = logits(dtype=precision.dtype), logits(dtype=precision.dtype)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.0])
    rows = divergence_oracle(student, teacher) * weights
    for reduction, expected in (("none", rows), ("sum", rows.sum()), ("mean", rows.sum() / weights.sum())):
        actual = kl_div(student, teacher, weights=weights, reduction=reduction, backend=backend)
        agree(actual, expected, precision.tolerance)
    mask = weights != 0
    actual = kl_div(student, teacher, weights=mask, backend=backend)
    agree(actual, divergence_oracle(student, teacher)[mask].mean(), precision.tolerance)


def test_leading_dimensions_are_flattened(backend, precision):
    student, teacher = logits(6, dtype=precision.dtype), logits(6, dtype=precision.dtype)
    rows = kl_div(student, teacher, reduction="none", backend=backend)
    shaped = kl_div(student.view(2, 3, -1), teacher.view(2, 3, -1), reduction="none", backend=backend)
    assert shaped.shape == (6,) and torch.equal(rows, shaped)


def test_valid_vocab_cuts_student_and_teacher_and_gives_no_gradient_to_the_rest(backend, precision, divergence_oracle):
    student, teacher = logits(4, 12, dtype=precision.dtype).requires_grad_(), logits(4, 15, dtype=precision.dtype)
    loss = kl_div(student, teacher, valid_vocab=10, backend=backend)
    agree(loss, divergence_oracle(student[:, :10], teacher[:, :10]).mean(), precision.tolerance)
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[:, 10:] == 0).all() and (gradient[:, :10] != 0).all()


BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.refused("triton", match="bfloat16"))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_16_bit_logits_lose_only_the_rounding_of_the_gradient(dtype, backend, divergence_oracle):
    student, teacher = logits(dtype=dtype).requires_grad_(), logits(dtype=dtype)
    loss = kl_div(student, teacher, backend=backend)
    exact = student.detach().double().requires_grad_()
    expected = divergence_oracle(exact, teacher).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    actual, wanted = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, exact)[0]
    assert (actual.double() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()


ERRORS = [
    ({"divergence": "kl"}, ValueError, "divergence must be one of forward, reverse, jsd; got 'kl'"),
    ({"beta": 1.0}, ValueError, "beta must be in [0.0001, 1 - 0.0001]"),
    ({"temperature": 0.0}, ValueError, "temperature must be None or a finite number above 0; got 0.0"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none; got 'batchmean'"),
    ({"weights": torch.ones(3)}, ValueError, "weights must have N = 6 elements; got shape [3]"),
    ({"weights": torch.ones(6, requires_grad=True)}, ValueError, "weights must not require a gradient"),
    ({"weights": [1] * 6}, TypeError, "weights must be None or a tensor; got list"),
    ({"valid_vocab": 51}, ValueError, "valid_vocab must be None or in [1, 50]; got 51"),
    (
        {"backend": "fast"},
        ValueError,
        "backend must be None or one of composed, cpu, cuda, reference, simt, triton; got 'fast'",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_error_names_argument_got_and_accepted(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kl_div(logits(), logits(), **options)


def test_shapes_must_agree():
    with pytest.raises(
        ValueError, match=r"teacher_logits must have student_logits's leading dimensions \[6\]; got \[5\]"
    ):
        kl_div(logits(6), logits(5))
    with pytest.raises(
        ValueError, match="valid_vocab must be given where student and teacher have different vocabularies"
    ):
        kl_div(logits(6, 50), logits(6, 60))
    with pytest.raises(ValueError, match=r"student_logits must have at least 2 dimensions; got shape \[50\]"):
        kl_div(logits()[0], logits()[0])
