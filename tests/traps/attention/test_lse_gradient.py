"""Trap: the gradient of lse is silently zero."""

import pytest
import torch


@pytest.mark.parametrize("with_out", [False, True])
def test_lse_is_differentiable_with_and_without_out(with_out, backend, attention, precision):
    query, key, prompt = (torch.randn(1, 2, n, 4, dtype=precision.dtype, requires_grad=True) for n in (3, 3, 2))
    out, lse = attention(query, key, key, prompt, prompt, causal=False, return_lse=True, backend=backend)
    keys = torch.cat([prompt, key], 2)
    scores = query @ keys.mT / 2
    expected, expected_out = torch.logsumexp(scores, -1), torch.softmax(scores, -1) @ keys
    weight = torch.randn_like(lse)
    actual_loss, expected_loss = (lse * weight).sum(), (expected * weight).sum()
    if with_out:
        actual_loss, expected_loss = actual_loss + out.square().sum(), expected_loss + expected_out.square().sum()
    inputs = (query, key, prompt)
    for a, e in zip(*(torch.autograd.grad(x, inputs) for x in (actual_loss, expected_loss)), strict=True):
        assert (e != 0).any()
        torch.testing.assert_close(a, e, rtol=precision.tolerance, atol=precision.tolerance)
