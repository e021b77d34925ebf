"""Trap: a kernel works only if the group of query heads or the head size is a power of two, or if Dv = D.

The shapes have group sizes and head sizes of real models, and values of another size than keys.
"""

import pytest
import torch

LARGE = pytest.mark.refused("simt", "cuda", "triton", "triton-gpu", match="256")
SHAPES = [
    (9, 3, 64, 64),
    (14, 2, 64, 64),
    (5, 1, 80, 80),
    (4, 2, 96, 96),
    (2, 1, 128, 128),
    pytest.param(2, 2, 256, 256, marks=LARGE),
    (3, 1, 64, 96),
    (3, 1, 96, 64),
]


@pytest.mark.parametrize(("heads", "kv_heads", "size", "value_size"), SHAPES)
def test_consecutive_query_heads_share_a_key_head(heads, kv_heads, size, value_size, backend, attention, precision):
    shapes = [(2, heads, 3, size), (2, kv_heads, 3, size), (2, kv_heads, 3, value_size)]
    shapes += [(1, kv_heads, 2, size), (1, kv_heads, 2, value_size)]
    inputs = [torch.randn(s, dtype=torch.float64).to(precision.dtype).requires_grad_() for s in shapes]
    out = attention(*inputs, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    query, key, value, prompt_key, prompt_value = exact
    keys = torch.cat([prompt_key.expand(2, -1, -1, -1), key], 2).repeat_interleave(heads // kv_heads, 1)
    values = torch.cat([prompt_value.expand(2, -1, -1, -1), value], 2).repeat_interleave(heads // kv_heads, 1)
    scores = (query @ keys.mT / size**0.5).masked_fill(~torch.ones(3, 5, dtype=torch.bool).tril(2), -torch.inf)
    expected = torch.softmax(scores, -1) @ values
    weight = torch.randn_like(out)
    found = [out, *torch.autograd.grad((out * weight).sum(), inputs)]
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), exact)]
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=precision.tolerance, atol=precision.tolerance)
