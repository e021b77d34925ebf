"""Trap: with retain_graph=True, a stored gradient that is scaled in place is scaled twice by two backwards."""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments


def loss_of_attention(backend, attention, sinks=None):
    query, key, prompt = (torch.randn(1, 2, n, 4).requires_grad_() for n in (3, 3, 2))
    out, lse = attention(query, key, key, prompt, prompt, sinks=sinks, return_lse=True, backend=backend)
    inputs = [query, key, prompt] if sinks is None else [query, key, prompt, sinks]
    return out.square().sum() + lse.sum(), inputs


def loss_of_logits(name, backend):
    student, teacher, weight = torch.randn(5, 4).requires_grad_(), torch.randn(5, 4), torch.randn(20, 4)
    if name == "kl_div":
        return kl_div(student, teacher, backend=backend), [student]
    if name == "moments":
        moments = teacher_moments(teacher, weight)
        return linear_kl_div_from_moments(student, moments, weight, backend=backend), [student]
    weight.requires_grad_(name == "trained head")
    inputs = [student, weight] if weight.requires_grad else [student]
    return linear_kl_div(student, teacher, weight, backend=backend), inputs


def check_two_backwards(loss, inputs, tolerance=1e-5):
    first = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    second = torch.autograd.grad(loss * 3, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["kl_div", "linear_kl_div", "trained head", "moments"])
def test_two_backwards_of_a_loss_give_the_same_gradient(name, backend):
    check_two_backwards(*loss_of_logits(name, backend))


def test_two_backwards_of_attention_give_the_same_gradient(backend, attention, attention_precision):
    check_two_backwards(*loss_of_attention(backend, attention), max(attention_precision.tolerance, 1e-5))


@pytest.mark.refused("simt", "cuda", match="sinks is given")
def test_two_backwards_of_attention_with_sinks_give_the_same_gradient(backend, attention):
    check_two_backwards(*loss_of_attention(backend, attention, torch.randn(2).requires_grad_()))
