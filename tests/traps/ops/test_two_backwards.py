"""retain_graph=True: a stored gradient that is scaled in place would apply the factor twice."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, prompt_attention, teacher_moments


def losses(backend):
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(5, 4).requires_grad_(), torch.randn(5, 4), torch.randn(20, 4)
    trained = weight.clone().requires_grad_()
    moments = teacher_moments(teacher, weight)
    query, key = torch.randn(1, 2, 3, 4).requires_grad_(), torch.randn(1, 2, 3, 4).requires_grad_()
    prompt = torch.randn(1, 2, 2, 4).requires_grad_()
    sinks = torch.randn(2).requires_grad_()
    out, lse = prompt_attention(query, key, key, prompt, prompt, sinks=sinks, return_lse=True, backend=backend)
    return {
        "kl_div": (kl_div(student, teacher, backend=backend), [student]),
        "linear_kl_div": (linear_kl_div(student, teacher, weight, backend=backend), [student]),
        "trained head": (linear_kl_div(student, teacher, trained, backend=backend), [student, trained]),
        "moments": (linear_kl_div_from_moments(student, moments, weight, backend=backend), [student]),
        "attention": (out.square().sum() + lse.sum(), [query, key, prompt, sinks]),
    }


@pytest.mark.parametrize("name", ["kl_div", "linear_kl_div", "trained head", "moments", "attention"])
def test_two_backwards_give_the_same_gradient_twice(name, backend):
    loss, inputs = losses(backend)[name]
    first = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    second = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c)
