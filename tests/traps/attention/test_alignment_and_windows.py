"""Bottom-right causal alignment, windows that reach into the prompt, and NaN behind masks."""

import pytest
import torch

from softprompt_kernels.ops import prompt_attention

EVERY_WINDOW = ("reference", "cpu", "simt")  # the composed backend has none


def seen(queries, own, prompt, backend, **options):
    """[M, P + N] which key gets weight: values are unit vectors and all scores are equal."""
    total = prompt + own
    values = torch.eye(total)[None, None]
    query, keys = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, total, 4)
    split = [prompt, own]
    (prompt_key, key), (prompt_value, value) = keys.split(split, 2), values.split(split, 2)
    out = prompt_attention(query, key, value, prompt_key, prompt_value, backend=backend, **options)
    return (out[0, 0] > 0).int().tolist()


def test_queries_are_aligned_with_the_last_keys(backend):
    assert seen(2, 4, 1, backend) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("backend", EVERY_WINDOW, indirect=True)
def test_a_window_counts_positions_across_prompt_and_own_keys(backend):
    assert seen(3, 3, 2, backend, window=3) == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("backend", EVERY_WINDOW, indirect=True)
def test_a_window_counts_from_the_prompt_s_own_length(backend):
    found = seen(2, 2, 3, backend, window=2, prompt_lengths=torch.tensor([1]))
    assert found == [[1, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("backend", EVERY_WINDOW, indirect=True)
def test_queries_before_their_keys_see_the_prompt_causally(backend):
    assert seen(3, 1, 3, backend) == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_what_padding_holds_does_not_leak(backend):
    torch.manual_seed(0)

    def run(padding):
        query, key, prompt = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 3, 8)
        key[0, :, 2:] = padding
        prompt[1, :, 1:] = padding
        inputs = [t.requires_grad_() for t in (query, key, key.detach().clone(), prompt, prompt.detach().clone())]
        lengths = {"key_lengths": torch.tensor([2, 4]), "prompt_lengths": torch.tensor([3, 1])}
        out = prompt_attention(*inputs, **lengths, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        for gradient in gradients[1:3]:
            assert (gradient[0, :, 2:] == 0).all()
        for gradient in gradients[3:]:
            assert (gradient[1, :, 1:] == 0).all()
        return out, *gradients

    torch.manual_seed(0)
    clean = run(0.0)
    for padding in (torch.nan, torch.inf):
        torch.manual_seed(0)
        for a, b in zip(run(padding), clean, strict=True):
            assert torch.equal(a, b)
