"""The temperature divides both logits, and loss and gradient are both multiplied by T²."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments

T = 3.0


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_temperature_is_scaled_logits_times_its_square(kind, backend, precision):
    hidden, teacher, weight = (torch.randn(s).to(precision.dtype) for s in ((5, 4), (5, 4), (20, 4)))
    hidden.requires_grad_()
    options = {"divergence": kind, "backend": backend}
    expected = T**2 * kl_div(hidden @ weight.mT / T, teacher @ weight.mT / T, **options)
    found = [
        kl_div(hidden @ weight.mT, teacher @ weight.mT, temperature=T, **options),
        linear_kl_div(hidden, teacher, weight, temperature=T, **options),
    ]
    if kind == "forward":
        moments = teacher_moments(teacher, weight, temperature=T, backend=backend)
        found.append(linear_kl_div_from_moments(hidden, moments, weight, temperature=T, backend=backend))
    (wanted,) = torch.autograd.grad(expected, hidden)
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=precision.tolerance, atol=precision.tolerance / 10)
        actual = torch.autograd.grad(loss, hidden)[0]
        torch.testing.assert_close(actual, wanted, rtol=precision.tolerance, atol=precision.tolerance / 10)
