"""Trap: the gradient of the generalised JSD is right only for β = ½. It is compared with finite differences."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_gradient_equals_finite_differences(beta, backend):
    torch.manual_seed(0)
    options = {"divergence": "jsd", "beta": beta, "reduction": "none", "backend": backend}
    teacher, student = torch.randn(3, 8).double(), torch.randn(3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kl_div(s, teacher, **options), (student,))
    hidden, weight = torch.randn(2, 3).double().requires_grad_(), torch.randn(6, 3).double()
    target = torch.randn(2, 3).double()
    assert torch.autograd.gradcheck(lambda h: linear_kl_div(h, target, weight, **options), (hidden,))


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_gradient_in_fp32_equals_finite_differences_in_float64(beta, backend):
    options = {"divergence": "jsd", "beta": beta, "reduction": "sum"}
    teacher, student = torch.randn(3, 8), torch.randn(3, 8, requires_grad=True)
    loss = kl_div(student, teacher, **options, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    step = 1e-5 * torch.eye(student.numel(), dtype=torch.float64).view(-1, *student.shape)
    above, below = (
        torch.stack([kl_div(student.detach() + s, teacher, **options, backend="reference") for s in steps])
        for steps in (step, -step)
    )
    torch.testing.assert_close(gradient.flatten(), (above - below) / 2e-5, rtol=1e-4, atol=1e-6, check_dtype=False)
