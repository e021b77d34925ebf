"""Trap: logits of −inf (probability 0) give NaN. Saturated rows and rows of only −inf have defined losses too."""

import math

import pytest
import torch

from softprompt_kernels.ops import kl_div

INF = math.inf


@pytest.fixture
def loss_and_gradient(backend):
    def loss_and_gradient(student, teacher, kind):
        student = torch.tensor(student, requires_grad=True)
        rows = kl_div(student, torch.tensor(teacher), divergence=kind, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(rows.sum(), student)
        return rows.detach(), gradient

    return loss_and_gradient


def test_a_vocabulary_entry_of_teacher_probability_zero_contributes_nothing(loss_and_gradient):
    rows, gradient = loss_and_gradient([[0.0, 1.0, 2.0]], [[0.0, 1.0, -INF]], "forward")
    q = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
    p = torch.softmax(torch.tensor([0.0, 1.0]), 0)
    torch.testing.assert_close(rows[0], (p * (p / q[:2]).log()).sum())
    torch.testing.assert_close(gradient[0], q - torch.cat([p, torch.zeros(1)]))


def test_a_vocabulary_entry_of_probability_zero_for_both_can_be_removed(loss_and_gradient):
    for kind in ("forward", "reverse", "jsd"):
        rows, gradient = loss_and_gradient([[0.0, 1.0, -INF]], [[1.0, -0.5, -INF]], kind)
        expected, expected_gradient = loss_and_gradient([[0.0, 1.0]], [[1.0, -0.5]], kind)
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(gradient[:, :2], expected_gradient)
        assert gradient[0, 2] == 0


def test_student_probability_zero_where_the_teachers_is_positive_gives_infinity(loss_and_gradient):
    rows, gradient = loss_and_gradient([[0.0, -INF]], [[0.0, 0.0]], "forward")
    assert rows[0] == INF
    torch.testing.assert_close(gradient, torch.tensor([[0.5, -0.5]]))
    rows, gradient = loss_and_gradient([[0.0, 0.0]], [[0.0, -INF]], "reverse")
    assert rows[0] == INF and (gradient == 0).all()
    rows, _ = loss_and_gradient([[0.0, 0.0]], [[0.0, -INF]], "jsd")
    assert 0 < rows[0] < math.log(2)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_row_with_only_minus_infinity(loss_and_gradient, kind):
    rows, gradient = loss_and_gradient([[0.0, 1.0]] * 2, [[-INF, -INF], [1.0, 0.0]], kind)
    assert rows[0] == 0 and (gradient[0] == 0).all()  # a teacher without a distribution is ignored
    assert rows[1] > 0 and (gradient[1] != 0).all()
    rows, gradient = loss_and_gradient([[-INF, -INF]], [[0.0, 1.0]], kind)
    assert rows[0] == INF and (gradient == 0).all()


@pytest.mark.parametrize("scale", [30.0, 200.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_saturated_rows_are_finite_and_correct(loss_and_gradient, kind, scale):
    student, teacher = [[scale, -scale, 0.0]], [[-scale, scale, 0.0]]
    rows, gradient = loss_and_gradient(student, teacher, kind)
    expected = math.log(2) if kind == "jsd" else 2 * scale
    assert rows[0].item() == pytest.approx(expected, rel=1e-5)
    assert gradient.isfinite().all()
    if kind == "forward":
        torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0]]), rtol=1e-6, atol=1e-6)


def test_student_probability_where_the_teachers_underflows_is_not_lost(loss_and_gradient):
    """The student puts all probability on an entry where the teacher's, e^−100, is 0 in fp32."""
    rows, gradient = loss_and_gradient([[0.0, 100.0]], [[0.0, -100.0]], "forward")
    assert rows[0].item() == pytest.approx(100.0)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]))
