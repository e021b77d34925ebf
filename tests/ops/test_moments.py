"""teacher_moments and linear_kl_div_from_moments: exact, although they keep d + 1 numbers instead of V logits."""

import re

import pytest
import torch
import torch.nn.functional as F

from softprompt_kernels.ops import TeacherMoments, linear_kl_div, linear_kl_div_from_moments, teacher_moments

TOKENS, SIZE, VOCAB = 7, 5, 40


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture
def dtype(request):
    """The dtype of the backend; float64 in a test without a backend."""
    return request.getfixturevalue("precision").dtype if "backend" in request.fixturenames else torch.float64


@pytest.fixture
def student(dtype):
    return randn(TOKENS, SIZE, dtype=dtype).requires_grad_()


@pytest.fixture
def teacher(dtype):
    return randn(TOKENS, SIZE, dtype=dtype)


@pytest.fixture
def weight(dtype):
    return randn(VOCAB, SIZE, dtype=dtype)


def agree(actual, expected, precision):
    """Within the precision of the backend."""
    tolerance = precision.tolerance
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance / 10, check_dtype=False)


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_moments_are_expectations_of_the_head(teacher, weight, chunk_tokens, backend, precision):
    bias = randn(VOCAB, dtype=precision.dtype)
    found = teacher_moments(
        teacher, weight, bias=bias, logit_scale=0.5, temperature=2.0, valid_vocab=33, chunk_tokens=chunk_tokens,
        backend=backend,
    )  # fmt: skip
    p = torch.softmax(0.25 * (teacher @ weight[:33].mT + bias[:33]), -1)
    agree(found.mean, p @ weight[:33], precision)
    agree(found.bias_mean, p @ bias[:33], precision)
    agree(found.entropy, -(p * p.log()).sum(-1), precision)
    assert (found.temperature, found.logit_scale, found.valid_vocab) == (2.0, 0.5, 33)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_equal_linear_kl_div(student, teacher, weight, reduction, backend, precision):
    head = {"bias": randn(VOCAB, dtype=precision.dtype), "logit_scale": 0.8, "temperature": 1.6, "valid_vocab": 35}
    shared = {"weights": torch.tensor([1, 0, 2, 0.5, 0, 1, 1]), "reduction": reduction}
    moments = teacher_moments(teacher, weight, **head, backend=backend)
    actual = linear_kl_div_from_moments(student, moments, weight, **head, **shared, chunk_tokens=2, backend=backend)
    expected = linear_kl_div(student, teacher, weight, **head, **shared, backend="reference")
    agree(actual, expected, precision)
    grad_rows = torch.randn_like(actual)
    agree(*(torch.autograd.grad(x, student, grad_rows)[0] for x in (actual, expected)), precision)


def test_labels_give_a_convex_combination_of_kl_and_nll(student, teacher, weight, backend, precision):
    labels = torch.tensor([3, 0, -100, 39, 7, -100, 1])
    moments = teacher_moments(teacher, weight, temperature=1.5)
    rows = linear_kl_div_from_moments(
        student, moments, weight, labels=labels, label_weight=0.3, temperature=1.5, reduction="none", backend=backend
    )
    kl = linear_kl_div(student, teacher, weight, temperature=1.5, reduction="none", backend="reference")
    nll = 1.5**2 * F.cross_entropy(student @ weight.mT / 1.5, labels, reduction="none")
    expected = torch.where(labels >= 0, 0.7 * kl + 0.3 * nll, kl)  # a row without a label has the KL only
    agree(rows, expected, precision)
    grad_rows = torch.randn_like(rows)
    agree(*(torch.autograd.grad(x, student, grad_rows)[0] for x in (rows, expected)), precision)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_without_moments_are_cross_entropy(student, weight, reduction, backend):
    labels = torch.tensor([3, 0, -100, 39, 7, -100, 1])
    actual = linear_kl_div_from_moments(
        student, None, weight, labels=labels, label_weight=1.0, reduction=reduction, backend=backend
    )
    expected = F.cross_entropy(student @ weight.mT, labels, reduction=reduction)
    torch.testing.assert_close(actual, expected)
    grad_rows = torch.randn_like(actual)
    torch.testing.assert_close(*(torch.autograd.grad(x, student, grad_rows)[0] for x in (actual, expected)))


def test_label_weight_one_makes_the_moments_irrelevant(student, teacher, weight, backend):
    labels = torch.arange(TOKENS)
    actual = linear_kl_div_from_moments(
        student, teacher_moments(teacher, weight), weight, labels=labels, label_weight=1.0, backend=backend
    )
    torch.testing.assert_close(actual, F.cross_entropy(student @ weight.mT, labels))


def test_gradcheck(student, teacher, weight):
    moments = teacher_moments(teacher, weight, temperature=1.5)
    labels = torch.tensor([3, 0, -100, 39, 7, -100, 1])

    def loss(student):
        return linear_kl_div_from_moments(
            student, moments, weight, labels=labels, label_weight=0.4, temperature=1.5, reduction="none",
            backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student,))


def test_gradient_near_convergence_is_that_of_float64(backend):
    """At KL ≈ 1e-6 the loss has lost its digits in fp32. The gradient has not."""
    weight = randn(500, 32, dtype=torch.float32)
    teacher = randn(16, 32, dtype=torch.float32)
    student = (teacher + 5e-4 * randn(16, 32, dtype=torch.float32)).requires_grad_()
    moments = teacher_moments(teacher, weight, backend=backend)
    loss = linear_kl_div_from_moments(student, moments, weight, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    expected = linear_kl_div(exact, teacher.double(), weight.double(), backend="reference")
    (wanted,) = torch.autograd.grad(expected, exact)
    assert 1e-7 < expected < 1e-5
    assert 0 <= loss < expected + 2e-6
    assert (gradient.double() - wanted).norm() < 5e-3 * wanted.norm()


def test_a_bias_of_minus_infinity_removes_a_vocabulary_entry(student, teacher, weight, backend, precision):
    bias = torch.zeros(VOCAB, dtype=weight.dtype)
    bias[-1] = -torch.inf
    moments = teacher_moments(teacher, weight, bias=bias, backend=backend)
    actual = linear_kl_div_from_moments(student, moments, weight, bias=bias, backend=backend)
    expected = linear_kl_div(student, teacher, weight, valid_vocab=VOCAB - 1, backend="reference")
    agree(actual, expected, precision)


def test_moments_can_be_indexed_by_rows(student, teacher, weight):
    rows = torch.tensor([4, 1])
    moments = teacher_moments(teacher, weight, bias=randn(VOCAB))
    assert torch.equal(moments[rows].mean, moments.mean[rows])
    assert torch.equal(moments[rows].entropy, moments.entropy[rows])
    assert torch.equal(moments[rows].bias_mean, moments.bias_mean[rows])
    assert moments[:2].temperature == moments.temperature


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_head_is_refused(student, teacher, weight, trained):
    bias = randn(VOCAB)
    moments = teacher_moments(teacher, weight, bias=bias)
    {"weight": weight, "bias": bias}[trained].requires_grad_()
    with pytest.raises(
        ValueError, match=f"{trained} must not require a gradient: the moments were made with its old value"
    ):
        linear_kl_div_from_moments(student, moments, weight, bias=bias)


ERRORS = [
    ({"temperature": 2.0}, "temperature must be 1.0, which the moments were made with; got 2.0"),
    ({"logit_scale": 2.0}, "logit_scale must be 1.0, which the moments were made with; got 2.0"),
    ({"valid_vocab": 30}, "valid_vocab must be 40, which the moments were made with; got 30"),
    ({"bias": torch.zeros(VOCAB)}, "bias must be None, as for the moments; got a tensor"),
    ({"label_weight": 0.5}, "labels must be given with a label_weight above 0; got None with 0.5"),
    ({"label_weight": 1.5}, "label_weight must be in [0, 1]; got 1.5"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must have shape [N = 7]; got [3]"),
    ({"reduction": "all"}, "reduction must be one of mean, sum, none; got 'all'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=[e[1] for e in ERRORS])
def test_error_names_argument_got_and_accepted(student, teacher, weight, options, message):
    moments = teacher_moments(teacher, weight)
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_kl_div_from_moments(student, moments, weight, **options)


def test_moments_must_have_the_tokens_and_dtype_of_the_student(student, teacher, weight):
    with pytest.raises(ValueError, match=re.escape("moments.mean must have shape of the student's tokens = [7, 5]")):
        linear_kl_div_from_moments(student, teacher_moments(teacher[:3], weight), weight)
    with pytest.raises(TypeError, match=r"moments.mean must be torch.float64 for a student in torch.float64; got"):
        linear_kl_div_from_moments(student, teacher_moments(teacher.float(), weight.float()), weight)
    with pytest.raises(TypeError, match="moments must be TeacherMoments; got Tensor"):
        linear_kl_div_from_moments(student, teacher, weight)
    with pytest.raises(
        ValueError, match=r"moments must be given unless label_weight is 1; got None and label_weight 0.5"
    ):
        linear_kl_div_from_moments(student, None, weight, labels=torch.arange(TOKENS), label_weight=0.5)


@pytest.mark.refused("triton", match="bfloat16")
def test_moments_of_16_bit_teachers_are_fp32(teacher, weight, backend):
    moments = teacher_moments(teacher.bfloat16(), weight.bfloat16(), backend=backend)
    assert isinstance(moments, TeacherMoments)
    assert moments.mean.dtype == moments.entropy.dtype == torch.float32
    exact = teacher_moments(teacher.bfloat16().double(), weight.bfloat16().double())
    torch.testing.assert_close(moments.mean.double(), exact.mean, rtol=1e-5, atol=1e-6)
