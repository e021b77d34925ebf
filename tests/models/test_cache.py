"""The cache of own tokens: same content as DynamicCache, without padding, and without a copy at every step."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt_kernels.models.cache import OwnCache

STEPS = (7, 1, 3, 1, 80, 1)  # crosses the first buffer of 7 + 64 columns
PADS = torch.tensor([5, 0, 2])


def tokens(m: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, m, 4, generator=generator), torch.randn(3, 2, m, 6, generator=generator)


def real_tokens(tensor: Tensor, row: int) -> Tensor:
    """The real tokens of a row of a left-padded tensor."""
    return tensor[row, :, PADS[row] :]


def test_without_padding_it_equals_dynamic_cache():
    ours, theirs = OwnCache(), DynamicCache()
    for seed, m in enumerate(STEPS):
        for layer in range(2):
            key, value = tokens(m, seed + 10 * layer)
            torch.testing.assert_close(ours.update(key, value, layer), theirs.update(key, value, layer), atol=0, rtol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_rows_are_stored_without_their_padding():
    ours, theirs = OwnCache(PADS), DynamicCache()
    for seed, m in enumerate(STEPS):
        key, value = tokens(m, seed)
        got, expected = ours.update(key, value, 0), theirs.update(key, value, 0)
        for actual, padded in zip(got, expected, strict=True):
            assert actual.shape == padded.shape
            for row in range(3):
                want = real_tokens(padded, row)
                assert torch.equal(actual[row, :, : want.shape[1]], want)


def test_prefill_in_chunks_shorter_than_the_padding():
    # The first two chunks of row 0 are only padding.
    ours, theirs = OwnCache(PADS), DynamicCache()
    for seed, m in enumerate((2, 2, 2, 1)):
        got, expected = ours.update(*tokens(m, seed), 0), theirs.update(*tokens(m, seed), 0)
    for row in range(3):
        want = real_tokens(expected[0], row)
        assert torch.equal(got[0][row, :, : want.shape[1]], want)


def test_rows_of_beams_share_the_padding_of_their_input():
    cache = OwnCache(torch.tensor([2, 0]))
    key = torch.arange(4.0).repeat_interleave(3).view(4, 1, 3, 1) * 10 + torch.arange(3.0).view(1, 1, 3, 1)
    got, _ = cache.update(key, key, 0)
    assert got[:2, 0, 0, 0].tolist() == [2.0, 12.0]
    assert got[2:, 0, 0, 0].tolist() == [20.0, 30.0]


@pytest.mark.parametrize("pads", [None, PADS], ids=["no-padding", "padding"])
def test_crop_and_reorder_work_as_in_dynamic_cache(pads):
    ours, theirs = OwnCache(pads), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*tokens(9, 0), 0)
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([0, 1, 2]))
    got, expected = ours.update(*tokens(2, 1), 0), theirs.update(*tokens(2, 1), 0)
    assert got[0].shape == expected[0].shape and ours.get_seq_length() == 8
    for row in range(3):
        want = real_tokens(expected[1], row) if pads is not None else expected[1][row]
        assert torch.equal(got[1][row, :, : want.shape[1]], want)


def test_beams_are_reordered():
    ours, theirs = OwnCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(*tokens(4, 0), 0)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(ours.update(*tokens(1, 1), 0), theirs.update(*tokens(1, 1), 0), atol=0, rtol=0)


def test_reset_empties_the_cache():
    cache = OwnCache()
    cache.update(*tokens(4, 0), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    got, _ = cache.update(*tokens(2, 1), 0)
    assert torch.equal(got, tokens(2, 1)[0])


def test_a_step_reuses_the_buffer():
    cache = OwnCache()
    before, _ = cache.update(*tokens(4, 0), 0)
    after, _ = cache.update(*tokens(1, 1), 0)
    assert after.data_ptr() == before.data_ptr()
