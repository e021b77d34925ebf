"""Trap: the result depends on where the prompt ends, on shared or copied prompts, or on the order of the batch."""

import pytest
import torch

from softprompt_kernels.ops import prompt_attention


@pytest.fixture
def inputs(precision):
    def make(batch=4, prompt=6, rows=1):
        shapes = [(batch, 4, 3, 8), *[(batch, 2, 3, 8)] * 2, *[(rows, 2, prompt, 8)] * 2]
        return [torch.randn(s, dtype=torch.float64).to(precision.dtype).requires_grad_() for s in shapes]

    return make


@pytest.fixture
def assert_close(precision):
    def check(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=precision.tolerance, atol=precision.tolerance)

    return check


def gradients(out, tensors, weight):
    return torch.autograd.grad((out * weight).sum(), tensors)


def test_moving_the_end_of_the_prompt_to_the_own_keys_changes_nothing(backend, attention, inputs, assert_close):
    """The last tokens of the prompt become the first own keys."""
    query, key, value, prompt_key, prompt_value = tensors = inputs(batch=1)
    whole = attention(*tensors, backend=backend)
    parts = [torch.cat([p[:, :, 2:], t], 2) for p, t in ((prompt_key, key), (prompt_value, value))]
    split = attention(query, *parts, prompt_key[:, :, :2], prompt_value[:, :, :2], backend=backend)
    assert_close(whole, split)
    weight = torch.randn_like(whole)
    for a, b in zip(*(gradients(x, tensors, weight) for x in (whole, split)), strict=True):
        assert_close(a, b)


def test_a_shared_prompt_equals_repeated_copies_with_summed_gradients(backend, attention, inputs, assert_close):
    *own, prompt_key, prompt_value = inputs()
    copies = [p.detach().expand(4, -1, -1, -1).clone().requires_grad_() for p in (prompt_key, prompt_value)]
    shared = attention(*own, prompt_key, prompt_value, backend=backend)
    copied = attention(*own, *copies, backend=backend)
    assert_close(shared, copied)
    weight = torch.randn_like(shared)
    once, each = gradients(shared, [prompt_key, prompt_value], weight), gradients(copied, copies, weight)
    for a, b in zip(once, each, strict=True):
        assert_close(a, b.sum(0, keepdim=True))


def test_a_permuted_batch_gives_permuted_results_and_runs_are_deterministic(backend, attention, inputs, assert_close):
    tensors = inputs(rows=2)
    index, order = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 3, 1])
    out = attention(*tensors, prompt_index=index, backend=backend)
    weight = torch.randn_like(out)
    first, again = (
        gradients(out, tensors, weight)
        if i == 0
        else gradients(attention(*tensors, prompt_index=index, backend=backend), tensors, weight)
        for i in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    moved = [t.detach()[order].requires_grad_() for t in tensors[:3]] + tensors[3:]
    shuffled = attention(*moved, prompt_index=index[order], backend=backend)
    assert_close(shuffled, out[order])
    for a, b in zip(gradients(shuffled, moved, weight[order])[3:], first[3:], strict=True):
        assert_close(a, b)


@pytest.mark.refused("simt", "cuda", match="head sizes of query and value are 16")
@pytest.mark.refused("triton", match="bfloat16")
def test_bf16_prompt_gradients_are_summed_in_fp32_over_the_batch(backend):
    """The error of a sum over 64 sequences is that of one rounding."""
    shapes = [(64, 2, 4, 16), *[(64, 2, 4, 16)] * 2, *[(1, 2, 8, 16)] * 2]
    tensors = [torch.randn(s).bfloat16().requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    weight = torch.randn(64, 2, 4, 16).bfloat16()
    found = gradients(prompt_attention(*tensors, backend=backend), tensors[3:], weight)
    wanted = gradients(prompt_attention(*exact, backend="reference"), exact[3:], weight.double())
    for a, e in zip(found, wanted, strict=True):
        rounded = (e.bfloat16().double() - e).norm()
        assert (a.double() - e).norm() < 1.5 * rounded
