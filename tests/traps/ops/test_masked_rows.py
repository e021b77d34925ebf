"""Trap: rows of weight 0 are computed and multiplied by 0, so a NaN in them reaches the loss and the gradient.

If all rows have weight 0, the loss is 0 and still attached to the graph.
"""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments


@pytest.fixture
def losses(backend):
    """Each loss as a function of student, teacher and options. For kl_div student and teacher are logits [N, 6]."""
    torch.manual_seed(0)
    weight = torch.randn(12, 6)

    def from_moments(student, teacher, **options):
        moments = teacher_moments(teacher.nan_to_num(), weight)
        return linear_kl_div_from_moments(student, moments, weight, backend=backend, **options)

    def trained_head(student, teacher, **options):
        return linear_kl_div(student, teacher, weight.clone().requires_grad_(), backend=backend, **options)

    return {
        "kl_div": lambda s, t, **o: kl_div(s, t, backend=backend, **o),
        "linear": lambda s, t, **o: linear_kl_div(s, t, weight, backend=backend, **o),
        "trained head": trained_head,
        "moments": from_moments,
    }


LOSSES = ("kl_div", "linear", "trained head", "moments")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_all_weights_zero_gives_loss_zero_that_is_attached_to_the_graph(losses, name, reduction):
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    loss = losses[name](student, teacher, weights=torch.zeros(4), reduction=reduction)
    assert (loss == 0).all() and loss.requires_grad
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_weight_zero_may_hold_nan(losses, name):
    student, teacher = torch.randn(5, 6), torch.randn(5, 6)
    student[1] = teacher[1] = teacher[3] = torch.nan
    student[3] = torch.inf
    student.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])
    loss = losses[name](student, teacher, weights=weights)
    (gradient,) = torch.autograd.grad(loss, student)
    kept = weights != 0
    assert torch.equal(gradient[~kept], torch.zeros(2, 6))
    kept_student = student.detach()[kept].requires_grad_()
    expected = losses[name](kept_student, teacher[kept], weights=weights[kept])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[kept], torch.autograd.grad(expected, kept_student)[0])


def test_rows_of_weight_zero_give_no_gradient_to_the_head(backend):
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    student[1] = teacher[1] = torch.nan
    weight = torch.randn(12, 6, requires_grad=True)
    linear_kl_div(student, teacher, weight, weights=torch.tensor([1.0, 0.0, 1.0]), backend=backend).backward()
    assert weight.grad.isfinite().all() and (weight.grad != 0).any()
