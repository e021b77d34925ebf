"""Trap: the temperature divides the logits of one model only, or the factor T² is missing in loss or gradient."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments

TEMPERATURE = 3.0


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_temperature_equals_divided_logits_and_a_loss_times_its_square(kind, backend, precision):
    hidden, teacher, weight = (torch.randn(s).to(precision.dtype) for s in ((5, 4), (5, 4), (20, 4)))
    hidden.requires_grad_()
    options = {"divergence": kind, "backend": backend}
    expected = TEMPERATURE**2 * kl_div(hidden @ weight.mT / TEMPERATURE, teacher @ weight.mT / TEMPERATURE, **options)
    found = [
        kl_div(hidden @ weight.mT, teacher @ weight.mT, temperature=TEMPERATURE, **options),
        linear_kl_div(hidden, teacher, weight, temperature=TEMPERATURE, **options),
    ]
    if kind == "forward":
        moments = teacher_moments(teacher, weight, temperature=TEMPERATURE, backend=backend)
        found.append(linear_kl_div_from_moments(hidden, moments, weight, temperature=TEMPERATURE, backend=backend))
    (wanted,) = torch.autograd.grad(expected, hidden)
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=precision.tolerance, atol=precision.tolerance / 10)
        actual = torch.autograd.grad(loss, hidden)[0]
        torch.testing.assert_close(actual, wanted, rtol=precision.tolerance, atol=precision.tolerance / 10)
