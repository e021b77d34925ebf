"""The CUDA kernels of the losses, run on the host by csrc/simt: dtypes, alignment, -inf logits, memory traffic."""

import pytest
import torch

from softprompt_kernels.kernels.cuda.native import HOST
from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments

pytestmark = pytest.mark.simt
KINDS = ("forward", "reverse", "jsd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    HOST.module().seed(0)


def rows_and_gradient(student, teacher, backend, **options):
    student = student.detach().requires_grad_()
    rows = kl_div(student, teacher, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach().double(), gradient.double()


def check(student, teacher, **options):
    """Compares with float64: losses to the accuracy of fp32, gradients to that of the student's dtype."""
    exact, exact_gradient = rows_and_gradient(student.double(), teacher.double(), "reference", **options)
    rows, gradient = rows_and_gradient(student, teacher, "simt", **options)
    torch.testing.assert_close(rows, exact, rtol=2e-5, atol=1e-12)
    rounding = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[student.dtype]
    torch.testing.assert_close(gradient, exact_gradient, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_dtypes(kind, student_dtype, teacher_dtype):
    """Rows of odd length: each begins at a different distance from a multiple of 16 bytes."""
    student, teacher = 3 * torch.randn(5, 1003), 3 * torch.randn(5, 1003)
    check(student.to(student_dtype), teacher.to(teacher_dtype), divergence=kind, temperature=1.5)


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 4095, 4096, 4097, 50257, 262_144])
def test_lengths_of_rows(vocab):
    check(torch.randn(2, vocab), torch.randn(2, vocab))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(4))
def test_rows_at_any_address(dtype, offset):
    """Student and teacher with different alignment, and rows whose columns are not contiguous."""
    student = torch.randn(3 * 203 + 4)[offset : offset + 3 * 203].view(3, 203).to(dtype)
    teacher = torch.randn(3, 210).to(dtype)[:, offset : offset + 203]
    check(student, teacher)
    check(torch.randn(203, 3).to(dtype).mT, torch.randn(3, 406).to(dtype)[:, ::2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_losses_near_zero_keep_their_relative_accuracy(kind, size):
    teacher = 4 * torch.randn(4, 3001)
    student = teacher + size * torch.randn(4, 3001)
    exact, exact_gradient = rows_and_gradient(student.double(), teacher.double(), "reference", divergence=kind)
    rows, gradient = rows_and_gradient(student, teacher, "simt", divergence=kind)
    torch.testing.assert_close(rows, exact, rtol=1e-3, atol=0)
    assert (gradient - exact_gradient).norm() <= 1e-3 * exact_gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_rows_and_logits_of_minus_infinity(kind):
    student, teacher = 30 * torch.randn(6, 600).sign(), 30 * torch.randn(6, 600).sign()
    teacher[1, ::3] = -torch.inf
    student[2, ::3] = teacher[2, ::3] = -torch.inf
    teacher[3] = -torch.inf
    student[4, 5] = teacher[4, 5] = -torch.inf
    if kind == "reverse":  # infinite if only the teacher's logit is -inf
        teacher[1, ::3] = student[1, ::3] = -torch.inf
    check(student[:5], teacher[:5], divergence=kind)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_heads_keep_accurate_gradients_near_convergence(dtype, schedule):
    HOST.module().seed(schedule)
    weight, teacher = torch.randn(1500, 64).to(dtype) / 8, torch.randn(6, 64).to(dtype)
    student = (teacher + 0.02 * torch.randn(6, 64)).to(dtype).requires_grad_()
    exact_student = student.detach().double().requires_grad_()
    exact = linear_kl_div(exact_student, teacher.double(), weight.double(), backend="reference")
    (wanted,) = torch.autograd.grad(exact, exact_student)
    moments = teacher_moments(teacher, weight, backend="simt")
    for loss in (
        linear_kl_div(student, teacher, weight, backend="simt"),
        linear_kl_div_from_moments(student, moments, weight, backend="simt"),
    ):
        torch.testing.assert_close(loss.double(), exact, rtol=3e-2, atol=0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient.double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.fixture
def counters():
    module = HOST.module()
    module.reset_counters()
    module.count(True)
    yield module.counters
    module.count(False)


@pytest.mark.parametrize(("kind", "reads"), [("forward", 1), ("reverse", 1), ("jsd", 2)])
def test_passes_over_given_logits(kind, reads, counters):
    """The forward reads both rows once (twice for jsd), the backward once more. Whole sectors are used."""
    student, teacher = torch.randn(2, 4096).half().requires_grad_(), torch.randn(2, 4096).half()
    rows = kl_div(student, teacher, divergence=kind, reduction="none", backend="simt")
    both, found = 2 * 2 * 4096 * 2, counters()
    assert found["launches"] == 1 and reads * both <= found["loaded_bytes"] <= reads * both + 64
    assert found["loaded_sectors"] * 32 <= found["loaded_bytes"] + 128
    HOST.module().reset_counters()
    rows.sum().backward()
    found = counters()
    assert found["launches"] == 1 and both <= found["loaded_bytes"] <= both + 128 + 2 * 128 * 24
    assert found["stored_bytes"] == both // 2 and found["shared_conflicts"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_over_a_tile_of_one_head(dtype, counters):
    """Exponentials of the moments: two reads of the GEMM's fp32 output and one write, for all dtypes of the head."""
    teacher_moments(torch.randn(2, 16).to(dtype), torch.randn(4096, 16).to(dtype), backend="simt")
    found, tile = counters(), 2 * 4096 * 4
    assert found["launches"] == 1
    assert 2 * tile <= found["loaded_bytes"] <= 2 * tile + 2 * 3000 and tile <= found["stored_bytes"] <= tile + 200


@pytest.mark.parametrize(("kind", "reads"), [("forward", 2), ("reverse", 2), ("jsd", 3)])
def test_passes_over_a_chunk_of_two_heads(kind, reads, counters):
    """Loss and gradient in one launch: two reads of the logits (three for jsd) and one write."""
    hidden, weight = torch.randn(2, 16).requires_grad_(), torch.randn(4096, 16)
    linear_kl_div(hidden, torch.randn(2, 16), weight, divergence=kind, backend="simt").backward()
    found, side = counters(), 2 * 4096 * 4
    assert found["launches"] == 1 and found["stored_bytes"] <= side + 64
    assert reads * 2 * side <= found["loaded_bytes"] <= reads * 2 * side + 64


# --- arguments --------------------------------------------------------------------------------------------------------


def test_labels_may_have_any_strides():
    hidden, weight, bias = torch.randn(2, 4), torch.randn(5, 4), torch.randn(5)
    moments = teacher_moments(torch.randn(2, 4), weight, bias=bias, backend="reference")
    for labels in (torch.tensor([1, 4, 3, 0])[::2], torch.tensor([3]).expand(2)):
        options = {"labels": labels, "label_weight": 0.3, "bias": bias, "reduction": "none"}
        found = linear_kl_div_from_moments(hidden, moments, weight, **options, backend="simt")
        wanted = linear_kl_div_from_moments(hidden, moments, weight, **options, backend="reference")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"logit_scale": 0.0}, {"logit_scale": 0.0, "softcap": 3.0}, {"logit_scale": 1e-50}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_whose_logits_are_all_equal(kind, options):
    hidden, weight = torch.randn(2, 4).requires_grad_(), torch.randn(5, 4)
    rows = linear_kl_div(
        hidden, torch.randn(2, 4), weight, divergence=kind, **options, reduction="none", backend="simt"
    )
    assert rows.tolist() == [0, 0]
    rows.sum().backward()
    assert not hidden.grad.any()


def test_a_label_that_the_bias_removes_has_an_infinite_loss_at_any_scale():
    hidden, weight, bias = torch.randn(2, 4), torch.randn(5, 4), torch.zeros(5)
    bias[2] = -torch.inf
    for scale in (1.5, -1.5):
        moments = teacher_moments(hidden, weight, bias=bias, logit_scale=scale, backend="simt")
        options = {"labels": torch.tensor([2, 1]), "label_weight": 0.3, "bias": bias, "logit_scale": scale}
        rows = linear_kl_div_from_moments(hidden, moments, weight, **options, reduction="none", backend="simt")
        assert rows[0] == torch.inf and rows[1].isfinite()


def test_gradients_too_large_for_fp16_are_infinite_so_that_a_gradient_scaler_notices():
    student, teacher = torch.tensor([[0.0, 4.0]]).half().requires_grad_(), torch.tensor([[4.0, 0.0]]).half()
    kl_div(student, teacher, reduction="sum", backend="simt").mul(1e6).backward()
    assert student.grad.tolist() == [[-torch.inf, torch.inf]]


@pytest.mark.parametrize("kind", [-1, 3])
def test_unknown_divergences_are_refused_with_the_accepted_values(kind):
    row = torch.zeros(1, 1)
    matrix = (row.data_ptr(), 0, 1, 1)
    addresses = dict.fromkeys(("student_bias", "teacher_bias", "weights", "row_scale", "statistics", "stream"), 0)
    numbers = {"scale": 1.0, "inner": 0.0, "beta": 0.5, "loss_scale": 1.0, "gradient_scale": 1.0}
    sizes = {"rows": 1, "vocab": 1, "columns": 1, "capped": False, "negated": False}
    call = (
        {"student": matrix, "teacher": matrix, "loss": row.data_ptr(), "gradient": None} | addresses | numbers | sizes
    )
    with pytest.raises(
        ValueError, match=rf"divergence must be one of 0 \(forward\), 1 \(reverse\), 2 \(jsd\); got {kind}"
    ):
        HOST.module().divergence_rows(kind=kind, **call)
