"""The C++ losses against the float64 reference: sizes with a tail, rows at the limits of formulas, accuracy, memory."""

import pytest
import torch

from softprompt_kernels.kernels.problems.loss import DIVERGENCES, Divergence
from softprompt_kernels.kernels.reference import divergence as reference
from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments

pytestmark = pytest.mark.usefixtures("module")
INF = torch.inf


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def run(student, teacher, kind, **options):
    """Loss and gradient of each row."""
    student = student.detach().requires_grad_()
    rows = kl_div(student, teacher, divergence=kind, beta=0.3, reduction="none", backend="cpu", **options)
    return rows.detach(), torch.autograd.grad(rows, student, torch.ones_like(rows))[0]


def expected_of(student, teacher, kind):
    return reference.rows(student.double(), teacher.double(), Divergence(kind, 0.3, 1.0))


def check(student, teacher, kind, tolerance=2e-5):
    """Compares the loss relative to its size (at least 1e-2), and each row of the gradient relative to its norm."""
    (loss, gradient), (expected, wanted) = run(student, teacher, kind), expected_of(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance / 100)
    error = (gradient.double() - wanted).norm(dim=1)
    # p (log p/q − KL) subtracts numbers of the size of the loss.
    rounding = 1e-6 * torch.where(expected.isfinite(), expected, 0)
    assert (error <= tolerance * wanted.norm(dim=1) + rounding).all(), (error, wanted.norm(dim=1))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("vocab", [1, 3, 15, 16, 17, 4095, 4097, 49153])
def test_vocabularies_that_end_inside_a_simd_vector(vocab, kind):
    student, teacher = torch.randn(3, vocab) * 2, torch.randn(3, vocab) * 2
    check(student, teacher, kind)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_vocabulary_of_a_quarter_of_a_million(kind):
    student, teacher = torch.randn(2, 262144) * 3, torch.randn(2, 262144) * 3
    check(student, teacher, kind)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_flat_row_against_a_sharp_row(kind):
    """The maxima of a flat and a sharp row differ from their normalisers by log V, so they centre D badly."""
    flat, sharp = torch.randn(3, 100000) * 0.01, torch.randn(3, 100000) * 0.01
    sharp[:, 7] += 30.0
    check(flat, sharp, kind)
    check(sharp, flat, kind)


# --- limits of the formulas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("difference", [47.5, 48.5, -47.5, -48.5, 80.0])
def test_rows_just_below_and_above_the_limit_of_the_formulas(difference, kind):
    """A row goes to the fallback when z_q − max z_q exceeds z_p − max z_p by more than 48 anywhere."""
    student, teacher = torch.randn(4, 300), torch.randn(4, 300)
    student[1:3, 5] -= difference
    student[3, 250] += difference
    check(student, teacher, kind)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("vocab", [40, 333])
def test_entries_of_minus_infinity_in_both_rows_change_nothing(vocab, kind):
    student, teacher = torch.randn(3, vocab), torch.randn(3, vocab)
    kept = torch.rand(vocab) > 0.3
    masked = [torch.where(kept, t, -INF) for t in (student, teacher)]
    (loss, gradient), (expected, wanted) = run(*masked, kind), expected_of(student[:, kept], teacher[:, kept], kind)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(gradient[:, kept].double(), wanted, rtol=1e-4, atol=1e-7)
    assert (gradient[:, ~kept] == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_row_with_an_infinity_or_nan_does_not_change_other_rows(kind):
    student, teacher = torch.randn(5, 100), torch.randn(5, 100)
    expected, wanted = run(student, teacher, kind)
    student[1, 3], teacher[3, 99], student[4, 0] = -INF, -INF, torch.nan
    loss, gradient = run(student, teacher, kind)
    for row in (0, 2):
        assert loss[row] == expected[row] and torch.equal(gradient[row], wanted[row])
    assert loss[4].isnan() and gradient[4].isnan().all()
    check(student[1:4:2], teacher[1:4:2], kind)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("distance", [1.5e-3, 1.5e-4], ids=["1e-6", "1e-8"])
def test_a_small_loss_and_its_gradient_are_accurate(distance, kind):
    teacher = torch.randn(8, 50000) * 3
    student = teacher + distance * torch.randn_like(teacher) + 4.0  # a constant changes no distribution
    (loss, gradient), (expected, wanted) = run(student, teacher, kind), expected_of(student, teacher, kind)
    assert expected.max() < 2e-6
    # Vectors of 4 or 8 lanes make longer fp32 sums than vectors of 16, and jsd is a difference of two sums.
    tolerance = 4e-3 if kind == "jsd" and distance < 1e-3 else 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert ((gradient.double() - wanted).norm(dim=1) <= 5e-3 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_a_small_kl_keeps_its_relative_accuracy(distance, kind):
    """Down to 5e-13. A difference of two sums of the size of the logits' differences has no digits left there."""
    teacher = torch.randn(4, 5000) * 2
    student = teacher + distance * torch.randn_like(teacher)
    (loss, _), (expected, _) = run(student, teacher, kind), expected_of(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_error_of_sixteen_bit_logits_is_no_worse_than_pytorch_s(kind, dtype):
    student, teacher = ((torch.randn(16, 5000) * 2).to(dtype).requires_grad_(grad) for grad in (True, False))
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    arguments = (log_q, log_p) if kind == "forward" else (log_p, log_q)
    theirs = torch.nn.functional.kl_div(*arguments, log_target=True, reduction="none").sum(-1)
    theirs_gradient = torch.autograd.grad(theirs, student, torch.ones_like(theirs))[0]
    loss, gradient = run(student, teacher, kind)
    expected, wanted = expected_of(student.detach(), teacher, kind)
    assert (loss - expected).abs().max() <= 2 * (theirs - expected).abs().max()
    error, their_error = ((g.double() - wanted).norm() for g in (gradient, theirs_gradient))
    assert error <= 2 * their_error and error <= torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_student_and_teacher_of_different_dtypes(dtypes):
    student, teacher = (torch.randn(3, 77).to(dtype) for dtype in dtypes)
    loss, gradient = run(student, teacher, "forward")
    expected, wanted = expected_of(student, teacher, "forward")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    assert gradient.dtype == dtypes[0]
    assert (gradient.double() - wanted).norm() <= torch.finfo(dtypes[0]).eps * wanted.norm() + 1e-6


# --- threads and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_same_bits_for_any_number_of_threads(threads, kind):
    student, teacher = torch.randn(7, 5001) * 20, torch.randn(7, 5001) * 20  # some rows go to the fallback
    results = []
    for count in (1, 2, 5, 16):
        threads(count)
        results.append(run(student, teacher, kind, temperature=4.0))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_logits_of_any_stride_give_the_same_bits():
    student, teacher = torch.randn(5, 64), torch.randn(5, 64)
    expected = run(student, teacher, "forward")
    wide = torch.full((10, 100), torch.nan)
    wide[::2, 20:84] = student
    transposed = teacher.mT.contiguous().mT
    shared = teacher[:1].expand(5, 64)
    for s, t in ((wide[::2, 20:84], teacher), (student, transposed), (wide[::2, 20:84], transposed)):
        for actual, wanted in zip(run(s, t, "forward"), expected, strict=True):
            assert torch.equal(actual, wanted)
    for actual, wanted in zip(run(student, shared, "jsd"), run(student, shared.contiguous(), "jsd"), strict=True):
        assert torch.equal(actual, wanted)


def test_skipped_rows_and_cut_columns_get_gradient_zero_even_with_nan():
    student, teacher = torch.randn(4, 50), torch.randn(4, 60)
    student[2], student[:, 41:] = torch.nan, torch.nan
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0])
    loss, gradient = run(student, teacher, "forward", weights=weights, valid_vocab=41)
    assert loss[2] == 0 and (gradient[2] == 0).all() and (gradient[:, 41:] == 0).all()
    assert loss.isfinite().all() and (gradient[[0, 1, 3], :41] != 0).all()


@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0}], ids=["plain", "bias and softcap"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_chunks_of_a_fused_head_equal_the_reference(head, kind):
    student, teacher, weight = torch.randn(70, 24), torch.randn(70, 24), torch.randn(1003, 24)
    options = {"divergence": kind, "reduction": "none", "temperature": 1.5, "softcap": head.get("softcap")}
    if head.get("bias"):
        options["bias"] = torch.randn(2006)[::2]  # not contiguous
    student.requires_grad_()
    exact = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    rows = linear_kl_div(student, teacher, weight, **options, chunk_tokens=32, backend="cpu")
    wide = student.detach().double().requires_grad_()
    expected = linear_kl_div(wide, teacher.double(), weight.double(), **exact, backend="reference")
    torch.testing.assert_close(rows.double(), expected, rtol=3e-5, atol=1e-6)
    actual, wanted = torch.autograd.grad(rows.sum(), student)[0], torch.autograd.grad(expected.sum(), wide)[0]
    assert (actual.double() - wanted).norm() <= 3e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_and_losses_over_several_vocabulary_tiles(dtype):
    """The vocabulary is larger than a tile, and the largest logit may be in any tile."""
    weight = torch.randn(9001, 16).to(dtype)
    weight[8999], weight[3] = weight[8999] * 4, weight[3] * 5
    hidden, student = torch.randn(50, 16).to(dtype), torch.randn(50, 16).to(dtype).requires_grad_()
    bias = torch.randn(18002, dtype=dtype)[::2].clone()
    bias[4096:8192] = -INF  # a whole tile of absent entries
    options = {"bias": bias, "logit_scale": 0.7, "temperature": 1.3}
    exact = {**options, "bias": bias.double()}
    found = teacher_moments(hidden, weight, **options, backend="cpu")
    wide = teacher_moments(hidden.double(), weight.double(), **exact, backend="reference")
    torch.testing.assert_close(found.mean.double(), wide.mean, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), wide.entropy, rtol=0, atol=3e-4)  # of logits up to 100
    torch.testing.assert_close(found.bias_mean.double(), wide.bias_mean, rtol=2e-5, atol=2e-5)
    labels = torch.randint(-1, 4096, (50,))
    loss = linear_kl_div_from_moments(
        student, found, weight, labels=labels, label_weight=0.4, chunk_tokens=16, backend="cpu", **options
    )
    doubled = student.detach().double().requires_grad_()
    expected = linear_kl_div_from_moments(
        doubled, wide, weight.double(), labels=labels, label_weight=0.4, backend="reference", **exact
    )
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-5)
    actual, wanted = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, doubled)[0]
    tolerance = 3e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


# --- state outside of a call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_changes_nothing(dtype):
    student, teacher, weight = torch.randn(5, 8), torch.randn(5, 8), torch.randn(40, 8)

    def losses():
        moments = teacher_moments(teacher, weight, backend="cpu")
        return [
            kl_div(student, teacher, reduction="none", backend="cpu"),
            linear_kl_div(student, teacher, weight, reduction="none", backend="cpu"),
            linear_kl_div_from_moments(student, moments, weight, reduction="none", backend="cpu"),
        ]

    expected = losses()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = losses()
    finally:
        torch.set_default_dtype(before)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32 and torch.equal(f, e)


def test_training_after_an_evaluation_in_inference_mode():
    """Memory that is kept between calls may have been allocated in that mode."""
    teacher, weight = torch.randn(5, 8), torch.randn(51, 8)
    with torch.inference_mode():
        linear_kl_div(torch.randn(7, 8), torch.randn(7, 8), weight, backend="cpu")
    student = torch.randn(5, 8, requires_grad=True)
    linear_kl_div(student, teacher, weight, backend="cpu").backward()
    assert (student.grad != 0).any()


@pytest.mark.parametrize("backend", ["composed", "cpu"])
def test_labels_beyond_the_vocabulary_are_refused(backend):
    student, weight = torch.randn(2, 8), torch.randn(50, 8)
    with pytest.raises(ValueError, match="labels must be below the vocabulary's size 50; got 60"):
        linear_kl_div_from_moments(
            student, None, weight, labels=torch.tensor([3, 60]), label_weight=1.0, backend=backend
        )


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_jsd_with_beta_close_to_0_and_1(beta):
    student, teacher = torch.randn(4, 100).requires_grad_(), torch.randn(4, 100)
    found = kl_div(student, teacher, divergence="jsd", beta=beta, reduction="none", backend="cpu")
    exact = kl_div(
        student.double(), teacher.double(), divergence="jsd", beta=beta, reduction="none", backend="reference"
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)
