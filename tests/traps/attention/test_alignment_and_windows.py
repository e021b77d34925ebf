"""Trap: queries are aligned with the first keys, windows ignore the prompt, or NaN in masked values leaks.

The causal mask is aligned at the bottom right: the last query sees the last key.
"""

import pytest
import torch

WITH_WINDOWS = ("reference", "cpu", "simt")  # composed has no windows; Triton's are in tests/kernels/triton


def visible_keys(attention, queries, own, prompt, backend, **options):
    """[M, P + N]: 1 if the query sees the key. Values are unit vectors and all scores are equal."""
    total = prompt + own
    values = torch.eye(total)[None, None]
    query, keys = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, total, 4)
    split = [prompt, own]
    (prompt_key, key), (prompt_value, value) = keys.split(split, 2), values.split(split, 2)
    out = attention(query, key, value, prompt_key, prompt_value, backend=backend, **options)
    return (out[0, 0] > 0).int().tolist()


def test_queries_are_aligned_with_the_last_keys(backend, attention):
    assert visible_keys(attention, 2, 4, 1, backend) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("backend", WITH_WINDOWS, indirect=True)
def test_a_window_counts_positions_across_prompt_and_own_keys(backend, attention):
    assert visible_keys(attention, 3, 3, 2, backend, window=3) == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("backend", WITH_WINDOWS, indirect=True)
def test_a_window_uses_the_prompts_own_length(backend, attention):
    found = visible_keys(attention, 2, 2, 3, backend, window=2, prompt_lengths=torch.tensor([1]))
    assert found == [[1, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("backend", WITH_WINDOWS, indirect=True)
def test_queries_at_positions_of_the_prompt_see_it_causally(backend, attention):
    assert visible_keys(attention, 3, 1, 3, backend) == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_nan_and_infinity_in_padding_do_not_leak(backend, attention):
    torch.manual_seed(0)

    def out_and_gradients(padding):
        query, key, prompt = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 3, 8)
        key[0, :, 2:] = padding
        prompt[1, :, 1:] = padding
        inputs = [t.requires_grad_() for t in (query, key, key.detach().clone(), prompt, prompt.detach().clone())]
        lengths = {"key_lengths": torch.tensor([2, 4]), "prompt_lengths": torch.tensor([3, 1])}
        out = attention(*inputs, **lengths, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        for gradient in gradients[1:3]:
            assert (gradient[0, :, 2:] == 0).all()
        for gradient in gradients[3:]:
            assert (gradient[1, :, 1:] == 0).all()
        return out, *gradients

    torch.manual_seed(0)
    clean = out_and_gradients(0.0)
    for padding in (torch.nan, torch.inf):
        torch.manual_seed(0)
        for a, b in zip(out_and_gradients(padding), clean, strict=True):
            assert torch.equal(a, b)
