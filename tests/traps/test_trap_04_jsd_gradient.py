"""The gradient of a generalised JSD against finite differences, at β that are no ½."""

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
