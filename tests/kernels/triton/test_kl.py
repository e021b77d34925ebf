"""The Triton losses in Triton's interpreter: against float64, at the ends of tiles, with maxima that grow."""

import math

import pytest
import torch

from softprompt_kernels.kernels.device import head_expectation
from softprompt_kernels.kernels.problems.loss import Divergence, LogitsProblem
from softprompt_kernels.kernels.reference import divergence as reference
from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.losses import kl_div, plan
from softprompt_kernels.ops import kl_div as op
from softprompt_kernels.ops import linear_kl_div, linear_kl_div_from_moments, teacher_moments

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(runtime.missing() is not None, reason=f"the triton backend: {runtime.missing()}"),
]
KINDS = ("forward", "reverse", "jsd")
BETA = 0.3
INF = torch.inf
TILE = 4096  # columns of a program's tile where there are few rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def problem(student, teacher, kind, temperature=1.0, weights=None, vocab=None):
    divergence = Divergence(kind, BETA, temperature)
    return LogitsProblem(student, teacher, weights, divergence, student.shape[1] if vocab is None else vocab)


def run(student, teacher, kind, **options):
    """The loss and the gradient of each row."""
    given = problem(student, teacher, kind, **options)
    loss, statistics = kl_div.forward(given)
    return loss, kl_div.backward(given, torch.ones(student.shape[0]), statistics)


def definition(student, teacher, kind, temperature=1.0):
    """The loss and the gradient of each row, by the reference in float64."""
    wide = (t.double() / temperature for t in (student, teacher))
    loss, gradient = reference.rows(*wide, Divergence(kind, BETA, 1.0))
    return loss * temperature**2, gradient * temperature


def check(student, teacher, kind, tolerance=1e-6):
    """Compares with float64, relative to the loss and to the gradient, whose rounding error may be that of the loss."""
    (loss, gradient), (expected, wanted) = run(student, teacher, kind), definition(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=3 * tolerance, atol=0)
    error = (gradient.double() - wanted).norm(dim=1)
    rounding = torch.where(expected.isfinite(), expected, 0)
    assert (error <= 10 * tolerance * wanted.norm(dim=1) + tolerance * rounding).all(), (error, wanted.norm(dim=1))


# --- against PyTorch --------------------------------------------------------------------------------------------------


def pytorch(student, teacher, kind, temperature):
    """The loss and its gradient as plain PyTorch computes them, in the dtype of the logits."""
    student = student.detach().requires_grad_()
    s, t = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))

    def kl(q, p):
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    if kind == "jsd":
        m = torch.logaddexp(t + math.log(BETA), s + math.log(1 - BETA))
        loss = BETA * kl(m, t) + (1 - BETA) * kl(m, s)
    else:
        loss = kl(s, t) if kind == "forward" else kl(t, s)
    loss = loss * temperature**2
    return loss.detach(), torch.autograd.grad(loss, student, torch.ones_like(loss))[0]


CASES = {
    "plain": lambda z, noise: (noise * 2, z * 2, 1.0),
    "temperature": lambda z, noise: (noise * 4, z * 4, 2.5),
    "near": lambda z, noise: (z * 2 + 0.02 * noise, z * 2, 1.0),
    "apart": lambda z, noise: (noise * 12, z * 12, 1.0),
    "saturated": lambda z, noise: (noise * 0.01 + 30.0 * (z > 2.5), z * 0.01 + 20.0 * (noise > 2.5), 1.0),
    "excluded by both": lambda z, noise: (*(t.masked_fill(z > 1, -60000.0) for t in (noise, z * 2)), 1.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_at_most_twice_those_of_pytorch(kind, dtype, case):
    """Three times for gradients. The rounding of an exact result to its dtype is allowed on top."""
    student, teacher, temperature = CASES[case](torch.randn(8, 1500), torch.randn(8, 1500))
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, gradient = run(student, teacher, kind, temperature=temperature)
    theirs, their_gradient = pytorch(student, teacher, kind, temperature)
    expected, wanted = definition(student, teacher, kind, temperature)
    error, their_error = ((x.double() - expected).abs().max() for x in (loss, theirs))
    assert error <= 2 * their_error + 1e-6 * expected.max()
    error, their_error = ((x.double() - wanted).norm() for x in (gradient, their_gradient))
    assert error <= 3 * their_error + torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_a_divergence_keeps_its_relative_accuracy_near_zero(distance, kind):
    """Down to losses of 1e-13; so does its gradient."""
    teacher = torch.randn(4, 9000) * 2
    student = teacher + distance * torch.randn_like(teacher)
    (loss, gradient), (expected, wanted) = run(student, teacher, kind), definition(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    assert ((gradient.double() - wanted).norm(dim=1) <= 3e-6 * wanted.norm(dim=1)).all()


# --- tiles and maxima -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 3, 16, 17, TILE - 1, TILE, TILE + 1, 3 * TILE + 5])
def test_vocabularies_that_do_not_fill_the_last_tile(vocab, kind):
    check(torch.randn(3, vocab) * 2, torch.randn(3, vocab) * 2, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_of_a_quarter_of_a_million(kind):
    check(torch.randn(2, 262144) * 3, torch.randn(2, 262144) * 3, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rise", [0.5, 30.0, 400.0])
@pytest.mark.parametrize("growing", ["student", "teacher", "both", "neither"])
def test_a_maximum_that_grows_from_tile_to_tile(growing, rise, kind):
    step = torch.arange(5 * TILE) // TILE * rise
    student, teacher = torch.randn(2, 5 * TILE), torch.randn(2, 5 * TILE)
    if growing in ("student", "both"):
        student += step
    if growing in ("teacher", "both"):
        teacher += step
    if growing == "neither":
        student -= step
        teacher -= step
    largest = float(torch.maximum(student.abs(), teacher.abs()).max())
    check(student, teacher, kind, tolerance=max(1e-6, largest * 2**-24))  # the rounding of logits in fp32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-6), (4.0, 5e-4)], ids=["no offset", "offset"])
def test_a_growing_maximum_keeps_the_accuracy_of_a_small_divergence(offset, tolerance, kind):
    """An offset does not change the distribution, but costs digits of the differences of logits."""
    teacher = torch.randn(3, 5 * TILE) + torch.arange(5 * TILE) / TILE
    student = teacher + 1e-4 * torch.randn_like(teacher) + offset
    (loss, gradient), (expected, wanted) = run(student, teacher, kind), definition(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    assert ((gradient.double() - wanted).norm(dim=1) <= tolerance * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["first", "last"])
@pytest.mark.parametrize("excluding", ["both", "teacher", "student"])
def test_tiles_where_every_logit_is_minus_infinity(excluding, empty, kind):
    student, teacher = torch.randn(3, 3 * TILE), torch.randn(3, 3 * TILE)
    tile = slice(0, TILE) if empty == "first" else slice(2 * TILE, 3 * TILE)
    for name, logits in (("student", student), ("teacher", teacher)):
        if excluding in (name, "both"):
            logits[:, tile] = -INF
    loss, gradient = run(student, teacher, kind)
    expected, wanted = definition(student, teacher, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_with_an_infinity_does_not_change_the_others(kind):
    student, teacher = torch.randn(6, 100), torch.randn(6, 100)
    expected, wanted = run(student, teacher, kind)
    student[1, 3], teacher[3, 99], student[4, 0], teacher[5, 7] = -INF, -INF, torch.nan, INF
    loss, gradient = run(student, teacher, kind)
    for row in (0, 2):
        assert loss[row] == expected[row] and torch.equal(gradient[row], wanted[row])
    for row in (4, 5):
        assert loss[row].isnan() and gradient[row].isnan().all()
    exact, exact_gradient = definition(student[1:4:2], teacher[1:4:2], kind)
    torch.testing.assert_close(loss[1:4:2].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[1:4:2].double(), exact_gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_one_row_and_of_many_give_the_same(kind, monkeypatch):
    student, teacher = torch.randn(7, 700) * 8, torch.randn(7, 700) * 8
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
    expected = run(student, teacher, kind, weights=weights)
    monkeypatch.setattr(plan, "_INTERPRETED_ROWS", 1)
    for actual, wanted in zip(run(student, teacher, kind, weights=weights), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)


# --- what a call reads and writes -------------------------------------------------------------------------------------


def test_logits_of_any_stride_and_alignment_are_read_in_place():
    student, teacher = torch.randn(5, 64), torch.randn(5, 64)
    expected = run(student, teacher, "forward")
    wide = torch.full((10, 101), torch.nan)
    wide[::2, 21:85] = student
    transposed = teacher.mT.contiguous().mT
    for s, t in ((wide[::2, 21:85], teacher), (student, transposed), (wide[::2, 21:85], transposed)):
        for actual, wanted in zip(run(s, t, "forward"), expected, strict=True):
            assert torch.equal(actual, wanted)
    shared = teacher[:1].expand(5, 64)
    for actual, wanted in zip(run(student, shared, "jsd"), run(student, shared.contiguous(), "jsd"), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_student_and_teacher_of_different_dtypes(dtypes):
    student, teacher = (torch.randn(3, 77).to(dtype) for dtype in dtypes)
    loss, gradient = run(student, teacher, "forward")
    expected, wanted = definition(student, teacher, "forward")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert gradient.dtype == dtypes[0]
    assert (gradient.double() - wanted).norm() <= torch.finfo(dtypes[0]).eps * wanted.norm() + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_reads_the_saved_statistics_and_does_not_change_the_inputs(kind):
    student, teacher = torch.randn(4, 300) * 3, torch.randn(4, 300) * 3
    copies = student.clone(), teacher.clone()
    given = problem(student, teacher, kind, temperature=1.5)
    _, statistics = kl_div.forward(given)
    assert statistics.shape == (4, kl_div.STATISTICS) == (4, 5) and statistics.dtype == torch.float32
    scale = torch.tensor([1.0, -2.0, 0.0, 1e-6])
    gradient = kl_div.backward(given, scale, statistics)
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])
    wanted = definition(student, teacher, kind, 1.5)[1] * scale[:, None]
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    without_statistics = kl_div.backward(given, scale, torch.zeros_like(statistics))
    assert (without_statistics == 0).all()  # an inverse sum of 0 means no gradient


def test_skipped_rows_and_cut_columns_get_gradient_zero_even_from_nan():
    student, teacher = torch.randn(4, 50), torch.randn(4, 60)
    student[2], student[:, 41:], teacher[2] = torch.nan, torch.nan, INF
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0])
    loss, gradient = run(student, teacher, "forward", weights=weights, vocab=41)
    assert loss[2] == 0 and (gradient[2] == 0).all() and (gradient[:, 41:] == 0).all()
    assert loss.isfinite().all() and (gradient[[0, 1, 3], :41] != 0).all()


# --- heads ------------------------------------------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "bias and softcap": {"bias": True, "softcap": 3.0, "temperature": 1.5},
    "negative scale": {"bias": True, "logit_scale": -0.8},
    "softcap of a negative scale": {"softcap": 2.0, "logit_scale": -0.8},
}


def live(hidden, weight, kind, head, backend, **options):
    head = dict(head)
    student, teacher = hidden
    if head.get("bias"):
        entries = torch.arange(2 * weight.shape[0]) % 64
        head["bias"] = (entries / 32 - 1).to(weight.dtype)[::2]  # not contiguous, and exact in every dtype
    return linear_kl_div(student, teacher, weight, divergence=kind, **head, backend=backend, **options)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_a_fused_head_agree_with_float64(kind, dtype, head, trained):
    hidden = [torch.randn(40, 24).to(dtype) for _ in range(2)]
    hidden[0][3] = torch.nan
    weights = torch.rand(40)
    weights[3] = 0
    weight = (torch.randn(1003, 24) / 2).to(dtype)
    results = []
    for backend, wide in (("triton", lambda t: t), ("reference", torch.Tensor.double)):
        student, teacher, w = (wide(t).clone() for t in (*hidden, weight))
        inputs = [student.requires_grad_(), w.requires_grad_()][: 1 + trained]
        w.requires_grad_(trained)
        rows = live((student, teacher), w, kind, HEADS[head], backend, weights=weights, chunk_tokens=16)
        results.append((rows.detach(), *torch.autograd.grad(rows, inputs)))
    for index, (actual, wanted) in enumerate(zip(*results, strict=True)):
        tolerance = 2e-6 if index == 0 or dtype == torch.float32 else torch.finfo(dtype).eps
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


def test_a_teacher_of_another_dtype_than_the_student():
    student, weight = torch.randn(5, 24), torch.randn(300, 24)
    teacher = torch.randn(5, 24, dtype=torch.bfloat16)
    loss = linear_kl_div(student, teacher, weight, backend="triton")
    expected = linear_kl_div(student.double(), teacher.double(), weight.double(), backend="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def near_convergence(distance):
    weight = (torch.randn(600, 64) / 4).half()
    teacher = torch.randn(24, 64).half()
    student = (teacher.double() + distance * torch.randn(24, 64).double()).half().requires_grad_()
    exact = student.detach().double().requires_grad_()
    expected = linear_kl_div(exact, teacher.double(), weight.double(), backend="reference")
    return student, teacher, weight, expected.item(), torch.autograd.grad(expected, exact)[0]


@pytest.mark.parametrize("distance", [0.024, 2e-3], ids=["1e-3", "1e-5"])
def test_sixteen_bit_heads_keep_the_gradient_near_convergence(distance):
    """Rounding the gradient to bf16 costs half a percent; logits in 16 bits would cost 4 to 100 %."""
    student, teacher, weight, expected, wanted = near_convergence(distance)
    moments = teacher_moments(teacher, weight, backend="triton")
    assert expected < 2e-3
    for loss in (
        linear_kl_div(student, teacher, weight, backend="triton"),
        linear_kl_div_from_moments(student, moments, weight, backend="triton"),
    ):
        (gradient,) = torch.autograd.grad(loss * 1024, student)
        assert (gradient.double() / 1024 - wanted).norm() < 1e-3 * wanted.norm()


def test_a_reverse_divergence_in_the_hundreds_does_not_overflow_fp16():
    student, weight = torch.randn(4, 8, dtype=torch.float16) * 20, torch.randn(30, 8, dtype=torch.float16) * 10
    student.requires_grad_()
    loss = linear_kl_div(student, -student.detach(), weight, divergence="reverse", backend="triton")
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


# --- expectations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1024, 16384], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_of_the_vocabulary_give_the_same_moments_and_losses(dtype, tile, monkeypatch):
    """The largest logit comes early or late, and one tile is excluded by a bias of −inf."""
    monkeypatch.setattr(head_expectation, "_TILE", tile)
    weight = torch.randn(9001, 16).to(dtype)
    weight[8999], weight[3] = weight[8999] * 4, weight[3] * 5
    hidden, student = torch.randn(50, 16).to(dtype), torch.randn(50, 16).to(dtype).requires_grad_()
    bias = torch.randn(18002, dtype=dtype)[::2].clone()
    bias[1024:2048] = -INF
    options = {"bias": bias, "logit_scale": 0.7, "temperature": 1.3}
    exact = {**options, "bias": bias.double()}
    found = teacher_moments(hidden, weight, **options, backend="triton")
    wide = teacher_moments(hidden.double(), weight.double(), **exact, backend="reference")
    torch.testing.assert_close(found.mean.double(), wide.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), wide.entropy, rtol=0, atol=5e-5)  # of logits up to 100
    torch.testing.assert_close(found.bias_mean.double(), wide.bias_mean, rtol=1e-5, atol=1e-5)
    labels = torch.randint(-1, 900, (50,))
    loss = linear_kl_div_from_moments(
        student, found, weight, labels=labels, label_weight=0.4, chunk_tokens=16, backend="triton", **options
    )
    doubled = student.detach().double().requires_grad_()
    expected = linear_kl_div_from_moments(
        doubled, wide, weight.double(), labels=labels, label_weight=0.4, backend="reference", **exact
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    actual, wanted = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, doubled)[0]
    tolerance = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


def test_labels_beyond_the_vocabulary_are_an_error():
    student, weight = torch.randn(2, 8), torch.randn(50, 8)
    with pytest.raises(RuntimeError, match="labels must be below the vocabulary's size 50"):
        linear_kl_div_from_moments(
            student, None, weight, labels=torch.tensor([3, 60]), label_weight=1.0, backend="triton"
        )


# --- no wait for the device -------------------------------------------------------------------------------------------


def test_no_loss_waits_for_the_device_forward_or_backward(forbid_waiting):
    student, teacher = torch.randn(6, 8), torch.randn(6, 8)
    weight, bias, weights = torch.randn(40, 8), torch.randn(40), torch.tensor([1.0, 0, 2, 1, 0, 1])
    labels = torch.tensor([3, -100, 5, 39, 0, 1])
    shared = {"weights": weights, "backend": "triton"}
    student.requires_grad_()
    trained = weight.clone().requires_grad_()
    for kind in KINDS:
        torch.autograd.grad(op(student, teacher, divergence=kind, **shared), student)
        options = {"divergence": kind, "bias": bias, "softcap": 5.0, "chunk_tokens": 4, **shared}
        torch.autograd.grad(linear_kl_div(student, teacher, weight, **options), student)
        torch.autograd.grad(linear_kl_div(student, teacher, trained, **options), [student, trained])
    moments = teacher_moments(teacher, weight, bias=bias, backend="triton")
    options = {"labels": labels, "label_weight": 0.5, "bias": bias, **shared}
    torch.autograd.grad(linear_kl_div_from_moments(student, moments, weight, **options), student)


def test_waiting_would_be_noticed(forbid_waiting):
    with pytest.raises(AssertionError, match="__bool__ waits for the device"):
        bool(torch.ones(1) > 0)
    with pytest.raises(AssertionError, match="nonzero waits for the device"):
        torch.ones(3).nonzero()
