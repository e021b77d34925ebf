"""−inf logits are probabilities of 0; saturated rows and rows of −inf alone have defined losses and no NaN."""

import math

import pytest
import torch

from softprompt_kernels.ops import kl_div

INF = math.inf


@pytest.fixture
def run(backend):
    def run(student, teacher, kind):
        student = torch.tensor(student, requires_grad=True)
        rows = kl_div(student, torch.tensor(teacher), divergence=kind, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(rows.sum(), student)
        return rows.detach(), gradient

    return run


def test_a_teacher_without_a_word_contributes_nothing_there(run):
    rows, gradient = run([[0.0, 1.0, 2.0]], [[0.0, 1.0, -INF]], "forward")
    q = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
    p = torch.softmax(torch.tensor([0.0, 1.0]), 0)
    torch.testing.assert_close(rows[0], (p * (p / q[:2]).log()).sum())
    torch.testing.assert_close(gradient[0], q - torch.cat([p, torch.zeros(1)]))


def test_both_sides_without_a_word_are_as_if_it_did_not_exist(run):
    for kind in ("forward", "reverse", "jsd"):
        rows, gradient = run([[0.0, 1.0, -INF]], [[1.0, -0.5, -INF]], kind)
        expected, expected_gradient = run([[0.0, 1.0]], [[1.0, -0.5]], kind)
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(gradient[:, :2], expected_gradient)
        assert gradient[0, 2] == 0


def test_a_student_that_rules_out_what_the_teacher_expects_is_infinitely_wrong(run):
    rows, gradient = run([[0.0, -INF]], [[0.0, 0.0]], "forward")
    assert rows[0] == INF
    torch.testing.assert_close(gradient, torch.tensor([[0.5, -0.5]]))
    rows, gradient = run([[0.0, 0.0]], [[0.0, -INF]], "reverse")
    assert rows[0] == INF and (gradient == 0).all()
    rows, _ = run([[0.0, 0.0]], [[0.0, -INF]], "jsd")
    assert 0 < rows[0] < math.log(2)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_row_of_minus_infinity_alone(run, kind):
    rows, gradient = run([[0.0, 1.0]] * 2, [[-INF, -INF], [1.0, 0.0]], kind)
    assert rows[0] == 0 and (gradient[0] == 0).all()  # such a teacher says nothing
    assert rows[1] > 0 and (gradient[1] != 0).all()
    rows, gradient = run([[-INF, -INF]], [[0.0, 1.0]], kind)
    assert rows[0] == INF and (gradient == 0).all()


@pytest.mark.parametrize("scale", [30.0, 200.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_saturated_rows_are_finite_and_right(run, kind, scale):
    student, teacher = [[scale, -scale, 0.0]], [[-scale, scale, 0.0]]
    rows, gradient = run(student, teacher, kind)
    expected = math.log(2) if kind == "jsd" else 2 * scale
    assert rows[0].item() == pytest.approx(expected, rel=1e-5)
    assert gradient.isfinite().all()
    if kind == "forward":
        torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0]]), rtol=1e-6, atol=1e-6)


def test_words_that_only_the_student_knows_are_not_lost_to_underflow(run):
    """e^−100 is 0 in fp32, and the student's whole mass sits there."""
    rows, gradient = run([[0.0, 100.0]], [[0.0, -100.0]], "forward")
    assert rows[0].item() == pytest.approx(100.0)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]))
