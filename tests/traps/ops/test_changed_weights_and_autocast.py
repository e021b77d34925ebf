"""Trap: a weight or prompt that is changed in place between forward and backward gives a wrong gradient silently.

Also: autocast, and weights that are not contiguous. tests/ops/test_registration.py compares compiled and eager results.
"""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, prompt_attention, teacher_moments


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.randn(30, 8)


def test_backward_raises_if_the_weight_has_changed(tensors, backend):
    student, teacher, weight = tensors
    moments = teacher_moments(teacher, weight)
    trained = weight.clone().requires_grad_()
    cases = [
        (linear_kl_div(student, teacher, weight, backend=backend), weight),
        (linear_kl_div_from_moments(student, moments, weight, backend=backend), weight),
        (linear_kl_div(student, teacher, trained, backend=backend), trained),
    ]
    for loss, changed in cases:
        with torch.no_grad():
            changed.mul_(0.9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_backward_raises_if_the_prompt_has_changed(backend, attention_precision):
    query, key, prompt = (torch.randn(1, 2, 3, 64, dtype=attention_precision.dtype) for _ in range(3))
    prompt.requires_grad_()
    out = prompt_attention(query, key, key, prompt, prompt, backend=backend)
    with torch.no_grad():
        prompt.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_casts_inputs_as_for_a_gemm(tensors):
    student, teacher, weight = tensors
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    prompt = torch.randn(1, 2, 2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(query, key.bfloat16(), key, prompt, prompt)
        loss = linear_kl_div(student, teacher, weight)
        moments_loss = linear_kl_div_from_moments(student, teacher_moments(teacher, weight), weight)
        logits_loss = kl_div(student, teacher)
    assert out.dtype == torch.bfloat16
    rounded = [t.bfloat16() for t in (query, key, key, prompt, prompt)]
    assert torch.equal(out, prompt_attention(*rounded))
    out.sum().backward()
    assert prompt.grad.dtype == torch.float32
    expected = linear_kl_div(student.bfloat16(), teacher, weight.bfloat16())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    torch.testing.assert_close(moments_loss, linear_kl_div(student.bfloat16(), teacher.bfloat16(), weight.bfloat16()))
    assert torch.equal(logits_loss, kl_div(student, teacher))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == torch.float32


def test_float64_stays_float64_under_autocast(tensors):
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kl_div(*(t.double() for t in tensors))
    assert loss.dtype == torch.float64


def test_a_weight_that_is_not_contiguous_gives_the_same_loss(tensors, backend):
    student, teacher, weight = tensors
    for view in (weight.mT.contiguous().mT, torch.cat([weight, weight], 1)[:, :8], weight.repeat_interleave(2, 0)[::2]):
        assert torch.equal(view, weight)
        torch.testing.assert_close(
            linear_kl_div(student, teacher, view, backend=backend),
            linear_kl_div(student, teacher, weight, backend=backend),
        )
