"""linear_kl_div in one pass over tiles of the vocabulary, without stored logits, against the float64 reference."""

import math

import pytest
import torch

from softprompt_kernels.kernels.cpu import linear_kl_div as cpu
from softprompt_kernels.kernels.cpu.rows import add_tile_
from softprompt_kernels.kernels.host import fused_linear, streamed_vocabulary
from softprompt_kernels.kernels.host.head_logits import Activation
from softprompt_kernels.kernels.host.rows import KlColumn, KlTileState
from softprompt_kernels.kernels.problems.loss import FORWARD, REVERSE, Divergence, Head, HeadProblem
from softprompt_kernels.kernels.reference import divergence as reference
from softprompt_kernels.ops import linear_kl_div

pytestmark = pytest.mark.usefixtures("module")
KINDS = (FORWARD, REVERSE)
INF = torch.inf
VOCAB, TILE, SIZE = 3000, 256, 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def always_streamed(monkeypatch):
    """Every forward and reverse KL streams the vocabulary, in small tiles."""
    monkeypatch.setattr(fused_linear, "_streaming_is_faster", lambda problem, *_: problem.divergence.kind != "jsd")
    monkeypatch.setattr(streamed_vocabulary, "_TILE", TILE)


def streamed(student, teacher, weight, kind, tile=TILE, softcap=None):
    """Loss [n], gradient [n, d] by hidden states, and the rows that need the fallback, of logits and W [V, d]."""
    count, vocab = student.shape
    state = KlTileState(
        torch.zeros(count, len(KlColumn), dtype=torch.float64),
        torch.zeros(2 * count, weight.shape[1], dtype=torch.float32),
    )
    activation = Activation(None, softcap)
    for start in range(0, vocab, tile):
        columns = slice(start, start + tile)
        both = torch.cat([student[:, columns], teacher[:, columns]])
        add_tile_(*both.chunk(2), activation, activation, Divergence(kind, 0.5, 1.0), state)
        state.sums.addmm_(both, weight[columns])
    fallback = streamed_vocabulary._needs_fallback(state.scalars)
    loss = streamed_vocabulary._loss(state.scalars)
    return loss, streamed_vocabulary._gradient_(state.sums, state.scalars, kind), fallback


def expected_of(student, teacher, weight, kind):
    loss, gradient = reference.rows(student.double(), teacher.double(), Divergence(kind, 0.5, 1.0))
    return loss, gradient @ weight.double()


def check(student, teacher, kind, loss_tolerance=2e-5, tolerance=2e-5, **options):
    """Compares the loss relative to its size, and each row of the gradient relative to its norm."""
    weight = torch.randn(student.shape[1], SIZE)
    loss, gradient, fallback = streamed(student, teacher, weight, kind, **options)
    expected, wanted = expected_of(student, teacher, weight, kind)
    assert not fallback.any()
    torch.testing.assert_close(loss, expected, rtol=loss_tolerance, atol=0)
    # p (log p/q − KL) subtracts numbers of the size of the loss.
    rounding = 3e-6 * expected * SIZE**0.5 if kind == "reverse" else 0
    error = (gradient.double() - wanted).norm(dim=1)
    assert (error <= tolerance * wanted.norm(dim=1) + rounding).all(), (error, wanted.norm(dim=1))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 0.3, 3.0])
def test_a_small_kl_and_its_gradient_keep_their_relative_accuracy(distance, kind):
    """Down to 5e-13. A difference of two sums of the size of the logits' differences has no digits left there."""
    teacher = torch.randn(4, VOCAB) * 2
    check(teacher + distance * torch.randn_like(teacher), teacher, kind, loss_tolerance=3e-6, tolerance=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_between_student_and_teacher_costs_only_its_rounding(kind):
    teacher = torch.randn(4, VOCAB) * 2
    student = teacher + 1e-3 * torch.randn_like(teacher)
    check(student + 100.0, teacher, kind, loss_tolerance=2e-2, tolerance=2e-2)
    check((student * 2**12).round() / 2**12 + 64.0, (teacher * 2**12).round() / 2**12, kind)  # these sums are exact


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_of_almost_equal_logits_is_not_negative(kind):
    teacher = torch.randn(200, 300) * 5
    student = torch.nextafter(teacher, teacher + torch.randn_like(teacher))
    loss, _, _ = streamed(student, teacher, torch.randn(300, SIZE), kind, tile=100)
    assert (loss >= 0).all() and (loss < 1e-10).all()


def flat():
    return 0.01 * torch.randn(VOCAB)


def with_peak(column, height=30.0):
    row = flat()
    row[column] += height
    return row


def with_unlikely_first_tile(offset):
    """The first tile is unlikely for both. There the logits differ by `offset`, and elsewhere by little."""
    teacher = flat()
    teacher[:TILE] -= 8
    student = teacher + 1e-2 * torch.randn(VOCAB)
    student[:TILE] += offset
    return student, teacher


ROWS = {
    "the teacher alone has a peak, late": lambda: (flat(), with_peak(2500)),
    "the teacher alone has a peak, early": lambda: (flat(), with_peak(3)),
    "the student alone has a peak, late": lambda: (with_peak(2500), flat()),
    "the student alone has a peak, early": lambda: (with_peak(3), flat()),
    "the student has an early peak, the teacher a late one": lambda: (with_peak(3), with_peak(2500)),
    "the student has a late peak, the teacher an early one": lambda: (with_peak(2500), with_peak(3)),
    "an unlikely first tile, student 1 higher": lambda: with_unlikely_first_tile(1.0),
    "an unlikely first tile, student 10 higher": lambda: with_unlikely_first_tile(10.0),
    "an unlikely first tile, student 10 lower": lambda: with_unlikely_first_tile(-10.0),
    "opposite slopes": lambda: (torch.linspace(-5, 5, VOCAB), torch.linspace(5, -5, VOCAB)),
    "slopes up": lambda: (torch.linspace(0, 31, VOCAB), torch.linspace(0, 30, VOCAB)),
    "slopes down": lambda: (torch.linspace(30, 0, VOCAB), torch.linspace(31, 0, VOCAB)),
    "a steep slope beyond the range of fp32 exponentials": lambda: (
        torch.linspace(-200, 200, VOCAB) + torch.randn(VOCAB),
        torch.linspace(-200, 200, VOCAB) + 50 * torch.linspace(-0.5, 0.5, VOCAB),
    ),
    "some tiles of the student are lower": lambda: (
        torch.cat([flat()[:1000], flat()[:800] - 10, flat()[:1200]]),
        flat(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_reference_and_centre_follow_the_tiles(row, kind):
    student, teacher = ROWS[row]()
    check(student[None], teacher[None], kind, tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peak", ["student", "teacher"])
def test_wide_tiles_whose_maxima_misjudge_their_sums(peak, kind):
    """The maxima of a flat and a sharp row are off from the centre by log V."""
    flat, sharp = torch.randn(2, 60000) * 0.01, torch.randn(2, 60000) * 0.01
    sharp[0, 3] += 30
    sharp[1, 50000] += 30
    student, teacher = (sharp, flat) if peak == "student" else (flat, sharp)
    check(student, teacher, kind, tile=30000, loss_tolerance=2e-6, tolerance=4e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 7, 16, 17, 2999, 3000, 5000])
def test_tiles_of_any_size(tile, kind):
    teacher = torch.randn(3, VOCAB if tile > 1 else 100) * 2
    check(teacher + 0.1 * torch.randn_like(teacher), teacher, kind, tile=tile)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_minus_infinity_in_both_rows_change_nothing(kind):
    student, teacher, weight = torch.randn(3, VOCAB), torch.randn(3, VOCAB), torch.randn(VOCAB, SIZE)
    kept = torch.rand(VOCAB) > 0.3
    kept[:TILE], kept[3 * TILE : 4 * TILE] = False, False  # whole tiles, the first among them
    masked = [torch.where(kept, t, -INF) for t in (student, teacher)]
    loss, gradient, fallback = streamed(*masked, weight, kind)
    expected, wanted = expected_of(student[:, kept], teacher[:, kept], weight[kept], kind)
    assert not fallback.any()
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-5, atol=2e-5)


def test_rows_that_need_the_fallback_do_not_change_other_rows():
    student, teacher, weight = torch.randn(9, VOCAB), torch.randn(9, VOCAB), torch.randn(VOCAB, SIZE)
    student[1, 700], teacher[2, 2999], student[3, 5], teacher[4, 600] = -INF, -INF, torch.nan, INF
    student[5], teacher[5] = -INF, -INF
    student[6, 1000] -= 60  # reverse: p e^D of an entry whose p is below the range of fp32
    teacher[7, 1000] -= 60  # forward
    student[8, 1000] += 60  # reverse, for all other entries
    for kind, expected_fallback in ((FORWARD, {1, 2, 3, 4, 5, 7}), (REVERSE, {1, 2, 3, 4, 5, 6, 8})):
        loss, gradient, fallback = streamed(student, teacher, weight, kind)
        assert set(fallback.nonzero().flatten().tolist()) == expected_fallback
        served = [row for row in range(9) if row not in expected_fallback]
        expected, wanted = expected_of(student[served], teacher[served], weight, kind)
        torch.testing.assert_close(loss[served], expected, rtol=2e-5, atol=0)
        torch.testing.assert_close(gradient[served].double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_of_a_softcap_is_in_the_gradient(kind):
    student, teacher, weight = torch.randn(3, VOCAB), torch.randn(3, VOCAB), torch.randn(VOCAB, SIZE)
    loss, gradient, _ = streamed(student, teacher, weight, kind, softcap=4.0)
    tanh = torch.tanh(student.double())
    expected, by_capped = reference.rows(4 * tanh, 4 * torch.tanh(teacher.double()), Divergence(kind, 0.5, 1.0))
    wanted = (by_capped * (1 - tanh.square())) @ weight.double()  # the factor 4 is the driver's
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    assert (gradient.double() - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads_and_for_a_row_alone(threads, kind):
    student, teacher = torch.randn(7, VOCAB) * 3, torch.randn(7, VOCAB) * 3
    student[4, 100] = torch.nan
    states = []
    for rows, count in ((slice(0, 7), 1), (slice(0, 7), 2), (slice(0, 7), 16), (slice(2, 3), 1)):
        threads(count)
        both = torch.cat([student[rows, :TILE], teacher[rows, :TILE]])
        n = both.shape[0] // 2
        state = KlTileState(torch.zeros(n, len(KlColumn), dtype=torch.float64), torch.zeros(2 * n, SIZE))
        add_tile_(*both.chunk(2), Activation(None, None), Activation(None, None), Divergence(kind, 0.5, 1.0), state)
        states.append((state.scalars, *both.chunk(2)))
    for found in states[1:3]:
        for f, expected in zip(found, states[0], strict=True):
            assert torch.equal(f.nan_to_num(), expected.nan_to_num())
    for f, expected in zip(states[3], states[0], strict=True):
        assert torch.equal(f[0], expected[2])


# --- the op -----------------------------------------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "everything": {"bias": True, "softcap": 2.0, "logit_scale": 0.6, "valid_vocab": 900},
}


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("separate", [False, True], ids=["shared head", "separate heads"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_all_options_of_the_op(head, kind, separate, dtype, chunk_tokens):
    student, weight = torch.randn(21, 24).to(dtype), (torch.randn(1003, 24) / 3).to(dtype)
    teacher, other = student, None
    if separate:
        teacher, other = torch.randn(21, 9).to(dtype), torch.randn(1003, 9).to(dtype)
    teacher = (teacher.float() + 0.3 * torch.randn(teacher.shape)).to(dtype)
    weights = torch.rand(21) * (torch.rand(21) > 0.3)
    options = {**HEADS[head], "divergence": kind, "temperature": 1.5, "reduction": "none", "weights": weights}
    if options.get("bias"):
        options["bias"] = torch.randn(2006).to(dtype)[::2]  # not contiguous
    student.requires_grad_()
    rows = linear_kl_div(
        student, teacher, weight, teacher_weight=other, chunk_tokens=chunk_tokens, backend="cpu", **options
    )
    wide = student.detach().double().requires_grad_()
    exact = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    expected = linear_kl_div(
        wide, teacher.double(), weight.double(), teacher_weight=None if other is None else other.double(),
        backend="reference", **exact,
    )  # fmt: skip
    torch.testing.assert_close(rows.double(), expected, rtol=2e-5, atol=1e-6)
    upstream = torch.randn(21)
    actual = torch.autograd.grad(rows, student, upstream)[0]
    wanted = torch.autograd.grad(expected, wide, upstream.double())[0]
    tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()
    assert (actual[weights == 0] == 0).all()


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("kind", KINDS)
def test_near_the_teacher_the_error_is_that_of_stored_logits(kind, monkeypatch):
    teacher, weight = torch.randn(32, 64), torch.randn(4000, 64) * 0.4
    student = (teacher + 1e-4 * torch.randn(32, 64)).requires_grad_()

    def run(student, teacher, weight, backend):
        loss = linear_kl_div(student, teacher, weight, divergence=kind, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    streamed_loss, streamed_gradient = run(student, teacher, weight, "cpu")
    monkeypatch.undo()
    stored_loss, stored_gradient = run(student, teacher, weight, "cpu")
    loss, gradient = run(student.detach().double().requires_grad_(), teacher.double(), weight.double(), "reference")
    assert 1e-8 < loss < 1e-6
    assert abs(streamed_loss - loss) <= 2 * abs(stored_loss - loss) + 1e-5 * loss
    assert (streamed_gradient - gradient).norm() <= 1.5 * (stored_gradient - gradient).norm() <= 0.02 * gradient.norm()


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_the_op_computes_fallback_rows_among_ordinary_ones(kind, chunk_tokens, monkeypatch):
    weight = torch.randn(1003, 24)
    student, teacher = torch.randn(21, 24), torch.randn(21, 24)
    student[[3, 11]] *= 40
    teacher[[7, 11]] *= 40
    student[5, 0], student[1] = torch.nan, torch.nan
    student.requires_grad_()
    weights = torch.ones(21)
    weights[1] = 0
    fallback_rows = []
    forward = fused_linear.chunked_logits.forward
    monkeypatch.setattr(
        fused_linear.chunked_logits,
        "forward",
        lambda p, kept, *rest: (fallback_rows.extend(kept.tolist()), forward(p, kept, *rest)),
    )
    options = {"divergence": kind, "reduction": "none", "weights": weights, "chunk_tokens": chunk_tokens}
    rows = linear_kl_div(student, teacher, weight, backend="cpu", **options)
    gradient = torch.autograd.grad(rows.sum(), student)[0]
    assert {5, 11} <= set(fallback_rows) <= {3, 5, 7, 11}
    ordinary = [row for row in range(21) if row not in (1, 5)]
    assert rows[1] == 0 and (gradient[1] == 0).all()
    wide = student.detach()[ordinary].double().requires_grad_()
    expected = linear_kl_div(
        wide, teacher[ordinary].double(), weight.double(), divergence=kind, reduction="none", backend="reference"
    )
    wanted = torch.autograd.grad(expected.sum(), wide)[0]
    assert rows[5].isnan() and gradient[5].isnan().all()
    torch.testing.assert_close(rows[ordinary].double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient[ordinary].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("kind", KINDS)
def test_equal_hidden_states_give_loss_and_gradient_zero(kind):
    hidden, weight = torch.randn(37, 24), torch.randn(1003, 24)
    student = hidden.clone().requires_grad_()
    loss = linear_kl_div(student, hidden, weight, divergence=kind, backend="cpu")
    assert loss == 0 and (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.usefixtures("always_streamed")
def test_a_trained_head_gets_the_gradient_of_stored_logits():
    student, teacher, weight = torch.randn(9, 24), torch.randn(9, 24), torch.randn(1003, 24)
    inputs = [t.requires_grad_() for t in (student, weight)]
    loss = linear_kl_div(student, teacher, weight, teacher_weight=weight.detach(), backend="cpu")
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = linear_kl_div(wide[0], teacher.double(), wide[1], teacher_weight=wide[1].detach(), backend="reference")
    for a, w in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, wide), strict=True):
        assert (a - w).norm() <= 2e-5 * w.norm()


# --- stored or streamed -----------------------------------------------------------------------------------------------


def problem(tokens, size, vocab, kind="forward", chunk_tokens=None):
    """A problem of these sizes, whose tensors take no memory."""
    hidden, weight = torch.empty(1, 1).expand(tokens, size), torch.empty(1, 1).expand(vocab, size)
    head = Head(weight, None, None, 1.0)
    return HeadProblem(hidden, hidden, head, head, None, Divergence(kind, 0.5, 1.0), chunk_tokens)


def test_the_vocabulary_is_streamed_where_few_tokens_logits_fit(threads):
    threads(2)

    def is_streamed(*sizes, need_gradient=True, **options):
        return fused_linear._streaming_is_faster(problem(*sizes, **options), None, need_gradient, cpu.fastest_gemm())

    assert is_streamed(1024, 896, 151936) and is_streamed(1024, 896, 151936, need_gradient=False)
    assert not is_streamed(1024, 896, 151936, kind="jsd")
    assert not is_streamed(1024, 896, 5000)
    assert not is_streamed(8, 896, 151936)
    assert not is_streamed(0, 896, 151936)
    assert not is_streamed(1024, 896, 151936, chunk_tokens=256)  # an explicit chunk stores its logits


def test_streaming_allocates_nothing_of_the_size_of_the_logits(threads):
    threads(2)
    sizes = 1024, 896, 151936
    tokens = streamed_vocabulary.tokens_at_once(problem(*sizes), 1024, cpu.fastest_gemm())
    assert tokens == 1024
    assert math.prod((2 * tokens, streamed_vocabulary._TILE)) * 4 <= 16 * 2**20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [151645, 7])
@pytest.mark.parametrize("owner", [0, 1], ids=["student", "teacher"])
def test_a_peak_of_hundreds_in_any_tile(column, owner, kind):
    """It moves the centre of its row out of the range of an exponential: only this row goes to the fallback."""
    weight = 0.1 * torch.randn(151936, 16)
    weight[:, 0], weight[column] = 0, 0
    weight[column, 0] = 1
    teacher = torch.randn(256, 16)
    teacher[:, 0] = 0
    student = teacher + 0.1 * torch.randn(256, 16)
    student[:, 0] = 0
    (student, teacher)[owner][3, 0] = 800
    student.requires_grad_()
    loss = linear_kl_div(student, teacher, weight, divergence=kind, reduction="none", backend="cpu")
    few = student[:5].detach().double().requires_grad_()
    wanted = linear_kl_div(
        few, teacher[:5].double(), weight.double(), divergence=kind, reduction="none", backend="reference"
    )
    torch.testing.assert_close(loss[:5].double(), wanted, rtol=1e-4, atol=1e-6)
    found, right = torch.autograd.grad(loss.sum(), student)[0][:5], torch.autograd.grad(wanted.sum(), few)[0]
    rounding = 1e-6 * wanted.detach()  # of subtracted numbers of the size of the loss
    assert ((found.double() - right).norm(dim=1) <= 2e-4 * right.norm(dim=1) + rounding).all()
    with torch.no_grad():
        without = linear_kl_div(student, teacher, weight, divergence=kind, reduction="none", backend="cpu")
    torch.testing.assert_close(without, loss.detach(), rtol=1e-4, atol=1e-6)
