"""Trap: a query that sees no key gives NaN. It must give out 0, lse −inf and gradient 0.

Other packages give lse +inf or 0.0 for such a row, or give lse in base 2.
"""

import pytest
import torch

CASES = {
    "no own key is valid and the prompt is empty": {"key_lengths": torch.tensor([0, 3])},
    "with sinks": {"key_lengths": torch.tensor([0, 3]), "sinks": torch.tensor([1.0, -1.0])},
    "the prompt's length is 0": {"key_lengths": torch.tensor([0, 3]), "prompt_lengths": torch.tensor([0])},
}


WITH_SINKS = pytest.param("with sinks", marks=pytest.mark.refused("simt", "cuda", match="sinks is given"))


@pytest.mark.parametrize("name", [WITH_SINKS if name == "with sinks" else name for name in CASES])
def test_out_lse_and_gradient_of_a_row_without_keys(name, backend, attention):
    torch.manual_seed(0)
    options = CASES[name]
    prompt = 2 if "prompt_lengths" in options else 0
    query, key = torch.randn(2, 2, 3, 4, requires_grad=True), torch.randn(2, 1, 3, 4, requires_grad=True)
    bank = torch.randn(1, 1, prompt, 4, requires_grad=True)
    out, lse = attention(query, key, key, bank, bank, **options, return_lse=True, backend=backend)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert lse[1].isfinite().all() and (out[1] != 0).any()
    loss = out.square().sum() + out.sum() + torch.where(lse == -torch.inf, 0, lse).sum()
    by_query, by_key, by_bank = torch.autograd.grad(loss, (query, key, bank))
    assert (by_query[0] == 0).all() and (by_key[0] == 0).all() and (by_bank == 0).all()
    assert by_query[1].isfinite().all() and (by_query[1, :, 1:] != 0).any()


def test_lse_is_the_natural_logarithm_of_the_denominator(backend, attention):
    query = torch.zeros(1, 1, 1, 4)
    keys = torch.zeros(1, 1, 3, 4)
    _, lse = attention(query, keys, keys, keys, keys, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, torch.tensor(6.0).log().view(1, 1, 1))
