"""Trap: a kernel assumes contiguous tensors, or sizes of at least one.

Cases: gradients of stride 0, views of packed QKV, transposed inputs, empty batches, N = 0, P = 0, M = 1.
"""

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments


def tensors(dtype, batch=2, queries=3, own=3, prompt=2, rows=1):
    shapes = [(batch, 4, queries, 8), *[(batch, 2, own, 8)] * 2, *[(rows, 2, prompt, 8)] * 2]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def outputs_and_gradients(attention, inputs, weight=None, **options):
    out = attention(*inputs, **options)
    loss = out.sum() if weight is None else (out * weight).sum()
    return [out, *torch.autograd.grad(loss, inputs)]


def test_an_output_gradient_of_stride_zero(backend, attention, attention_precision):
    inputs = tensors(attention_precision.dtype)
    expanded = outputs_and_gradients(attention, inputs, backend=backend)
    dense = outputs_and_gradients(
        attention, inputs, torch.ones(2, 4, 3, 8, dtype=attention_precision.dtype), backend=backend
    )
    for a, b in zip(expanded, dense, strict=True):
        assert torch.equal(a, b)
    hidden, teacher, weight = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(9, 4)
    for loss in (
        lambda: linear_kl_div(hidden, teacher, weight, reduction="none", backend=backend),
        lambda: linear_kl_div(hidden, teacher, weight.clone().requires_grad_(), reduction="none", backend=backend),
        lambda: kl_div(hidden, teacher, reduction="none", backend=backend),
    ):
        by_sum, by_ones = torch.autograd.grad(loss().sum(), hidden), torch.autograd.grad(loss(), hidden, torch.ones(3))
        assert torch.equal(by_sum[0], by_ones[0])


def test_views_of_packed_qkv_and_transposed_prompts_equal_contiguous_inputs(backend, attention, attention_precision):
    packed = torch.randn(2, 3, 8 * (4 + 2 + 2), dtype=attention_precision.dtype)
    query, key, value = (t.unflatten(2, (-1, 8)).transpose(1, 2) for t in packed.split([32, 16, 16], 2))
    prompt = torch.randn(1, 2, 8, 5, dtype=attention_precision.dtype).transpose(2, 3)  # no unit last stride
    views = [query, key, value, prompt, prompt]
    expected = attention(*(t.contiguous() for t in views), backend=backend)
    torch.testing.assert_close(attention(*views, backend=backend), expected, rtol=0, atol=0)


def test_transposed_and_strided_hidden_states_and_weights(backend, precision):
    hidden, teacher = torch.randn(4, 6).to(precision.dtype).mT, torch.randn(6, 8).to(precision.dtype)[:, ::2]
    weight = torch.randn(4, 20).to(precision.dtype).mT
    dense = [t.contiguous() for t in (hidden, teacher, weight)]
    actual, expected = (linear_kl_div(*t, backend=backend) for t in ((hidden, teacher, weight), dense))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        teacher_moments(teacher, weight, backend=backend).mean, teacher_moments(*dense[1:], backend=backend).mean
    )


SIZES = {
    "no sequence": {"batch": 0},
    "no query": {"queries": 0},
    "no own key": {"own": 0, "queries": 1},
    "no prompt": {"prompt": 0},
    "one query": {"queries": 1},
}


@pytest.mark.parametrize("name", SIZES)
def test_empty_and_single_sizes(name, backend, attention, attention_precision):
    inputs = tensors(attention_precision.dtype, **SIZES[name])
    options = {"causal": name != "no own key", "backend": backend}
    out, *gradients = outputs_and_gradients(attention, inputs, **options)
    assert out.shape == (*inputs[0].shape[:3], 8)
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
    assert all(g.isfinite().all() for g in (out, *gradients))


def test_attention_without_any_key(backend, attention, attention_precision):
    inputs = tensors(attention_precision.dtype, own=0, prompt=0)
    out, lse = attention(*inputs, causal=False, return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()
    (gradient,) = torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0, lse).sum(), inputs[0])
    assert (gradient == 0).all()


def test_losses_without_tokens(backend):
    student, teacher, weight = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4), torch.randn(9, 4)
    moments = teacher_moments(teacher, weight, backend=backend)
    for loss in (
        kl_div(student, teacher, backend=backend),
        linear_kl_div(student, teacher, weight, backend=backend),
        linear_kl_div_from_moments(student, moments, weight, backend=backend),
    ):
        assert loss == 0
        assert torch.autograd.grad(loss, student)[0].shape == (0, 4)
