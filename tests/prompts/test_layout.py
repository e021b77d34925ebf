"""The layout of a KV prompt is the one that PEFT reads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt_kernels.prompts.layout import flatten, unflatten

SIZES = st.integers(1, 4)


@given(layers=SIZES, heads=SIZES, tokens=SIZES, dim=SIZES)
def test_peft_reads_every_number_at_its_place(layers: int, heads: int, tokens: int, dim: int) -> None:
    key = torch.arange(layers * heads * tokens * dim).view(layers, heads, tokens, dim)
    value = -1 - key
    flat = flatten(key, value)
    # PEFT: view(batch, k, 2L, Hkv, D), permute([2, 0, 3, 1, 4]), split in pairs of (key, value).
    seen = flat[None].view(1, tokens, 2 * layers, heads, dim).permute(2, 0, 3, 1, 4).split(2)
    for layer, (layer_key, layer_value) in enumerate(seen):
        assert torch.equal(layer_key[0], key[layer]) and torch.equal(layer_value[0], value[layer])
    again = unflatten(flat, layers, heads)
    assert torch.equal(again[0], key) and torch.equal(again[1], value)


def test_values_narrower_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="same head dimension"):
        flatten(torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 4))


@pytest.mark.parametrize(("shape", "layers", "heads"), [((5, 12), 2, 4), ((5,), 1, 1), ((5, 12), 0, 1)])
def test_rows_that_do_not_divide_are_refused(shape: tuple[int, ...], layers: int, heads: int) -> None:
    with pytest.raises(ValueError, match="flat: got shape"):
        unflatten(torch.zeros(shape), layers, heads)
