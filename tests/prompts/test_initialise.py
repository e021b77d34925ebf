"""Every method of initialisation against its definition."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import shift_keys
from softprompt_kernels.prompts import Prefix, initialise


def prefix_of_positions(length: int) -> Prefix:
    """Every key is its position, so a test can see which token it was."""
    positions = torch.arange(length, dtype=torch.float32)[None, None, :, None]
    return Prefix.of([(positions.expand(1, 2, -1, 4), -positions.expand(1, 2, -1, 4))] * 2)


def prefix_with_sink(length: int) -> Prefix:
    """Channels and layers with very different offsets and scales, and a first token far from all others."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for scale in (0.1, 30.0):
        offset = scale * 5 * torch.randn(2, 1, 2, 1, 4, generator=generator)
        pair = offset + scale * torch.randn(2, 1, 2, length, 4, generator=generator)
        pair[..., 0, :] = 1000.0
        layers.append((pair[0], pair[1]))
    return Prefix.of(layers)


@pytest.mark.parametrize(("available", "k"), [(1, 1), (7, 1), (7, 2), (7, 7), (10, 4), (616, 72), (1000, 999)])
def test_strided_indices_spread_evenly_from_the_first_to_the_last(available: int, k: int) -> None:
    index = initialise.strided_indices(available, k)
    assert index.dtype == torch.int64 and len(index) == k and index[0] == 0
    if k > 1:
        gaps = index.diff()
        assert index[-1] == available - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("available", "k"), [(5, 0), (5, -1), (5, 6), (0, 1)])
def test_fewer_than_one_or_more_tokens_than_available_are_refused(available: int, k: int) -> None:
    with pytest.raises(SoftPromptError, match=r"at least 1 token|cannot have"):
        initialise.strided_indices(available, k)
    with pytest.raises(SoftPromptError, match=r"at least 1 token|cannot have"):
        initialise.first_tokens(torch.zeros(available, dtype=torch.int64), k)


def test_first_tokens_of_a_context_are_not_rotated() -> None:
    prefix = initialise.from_prefix(prefix_of_positions(9), 4)
    assert prefix.layers[1][0][0, 0, :, 0].tolist() == [0, 1, 2, 3]


def test_strided_tokens_of_a_context_are_rotated_by_k_minus_its_length() -> None:
    deltas = []

    def rotate(prefix: Prefix, delta: int) -> Prefix:
        deltas.append(delta)
        return Prefix.of((key + delta, value) for key, value in prefix.layers)

    prefix = initialise.from_prefix(prefix_of_positions(9), 3, "strided", rotate=rotate)
    assert deltas == [3 - 9]
    assert prefix.layers[0][0][0, 1, :, 2].tolist() == [0 - 6, 4 - 6, 8 - 6]
    assert prefix.layers[0][1][0, 1, :, 2].tolist() == [0, -4, -8]


def test_strided_tokens_without_rotate_are_not_rotated() -> None:
    prefix = initialise.from_prefix(prefix_of_positions(9), 3, "strided")
    assert prefix.layers[0][0][0, 0, :, 0].tolist() == [0, 4, 8]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_strided_keys_give_queries_at_k_the_logits_of_queries_after_the_context(
    family: str,
    make_model: Callable[..., PreTrainedModel],
    capture: Callable[[PreTrainedModel, Tensor], Prefix],
    cached_logits: Callable[[PreTrainedModel, Tensor, Prefix], Tensor],
    ids: Tensor,
) -> None:
    model = make_model(family).double()
    context = capture(model, torch.randint(3, 50, (1, 20), generator=torch.Generator().manual_seed(1)))
    kept = initialise.strided_indices(20, 6)
    # Reference: the kept keys are in the cache as captured, and queries have positions 20, 21, ...
    cache = DynamicCache()
    for layer, (key, value) in enumerate(context.layers):
        cache.update(key[:, :, kept].expand(2, -1, -1, -1), value[:, :, kept].expand(2, -1, -1, -1), layer)
    positions = torch.arange(20, 27)[None].expand(2, -1)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache, position_ids=positions).logits
    moved = initialise.from_prefix(context, 6, "strided", rotate=partial(shift_keys, model))
    # transformers rounds sines and cosines to fp32 in every model, so a float64 model agrees to 1e-6 only.
    assert torch.allclose(cached_logits(model, ids, moved), expected, rtol=0, atol=1e-6)
    unmoved = initialise.from_prefix(context, 6, "strided")
    assert not torch.allclose(cached_logits(model, ids, unmoved), expected, rtol=0, atol=1e-3)


def test_from_prefix_refuses_banks_and_unknown_methods() -> None:
    with pytest.raises(ValueError, match='accepted are "first" and "strided"'):
        initialise.from_prefix(prefix_of_positions(9), 3, "last")
    bank = Prefix.of([(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))])
    with pytest.raises(ValueError, match="bank of 2 rows"):
        initialise.from_prefix(bank, 2)


def test_random_prefix_has_the_mean_and_deviation_of_every_channel() -> None:
    like = prefix_with_sink(400)
    prefix = initialise.random_prefix(like, 4000, generator=torch.Generator().manual_seed(3))
    for original, drawn in zip(like.layers, prefix.layers, strict=True):
        for one, two in zip(original, drawn, strict=True):
            std, mean = torch.std_mean(one[:, :, 1:], dim=2)
            new_std, new_mean = torch.std_mean(two[:, :, 1:], dim=2)
            # Five standard errors. At 4000 tokens one is std/63 for the mean and std/89 for the standard deviation.
            assert ((new_mean - mean).abs() < 5 * std / 63).all()
            assert ((new_std - std).abs() < 5 * std / 89).all()


def test_random_prefix_copies_the_sink_and_leaves_it_out_of_the_moments() -> None:
    like = prefix_with_sink(50)
    prefix = initialise.random_prefix(like, 6, sink_tokens=1)
    for (key, _), (new, _) in zip(like.layers, prefix.layers, strict=True):
        assert torch.equal(new[:, :, 0], key[:, :, 0])
        assert new[:, :, 1:].abs().max() < 900
    assert initialise.random_prefix(like, 1, sink_tokens=2).length == 1
    assert (initialise.random_prefix(like, 3, sink_tokens=0).layers[0][0] != 1000).all()


def test_random_methods_are_reproducible_with_a_generator() -> None:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    one, two = (initialise.random_prefix(prefix_with_sink(9), 4, generator=seeded()) for _ in range(2))
    assert torch.equal(one.layers[1][1], two.layers[1][1])
    assert torch.equal(*(initialise.vocabulary_tokens(50, 9, generator=seeded()) for _ in range(2)))
    embed = torch.nn.Embedding(50, 6)
    assert torch.equal(*(initialise.random_embedding(embed, 50, 3, generator=seeded()) for _ in range(2)))


def test_random_prefix_refuses_a_prefix_that_is_too_short() -> None:
    with pytest.raises(SoftPromptError, match="at least 3 to measure"):
        initialise.random_prefix(prefix_with_sink(2), 5)
    with pytest.raises(SoftPromptError, match="at least 1 token"):
        initialise.random_prefix(prefix_with_sink(9), 0)
    with pytest.raises(ValueError, match="sink_tokens: got -1"):
        initialise.random_prefix(prefix_with_sink(9), 2, sink_tokens=-1)


def test_token_ids_of_each_method() -> None:
    ids = torch.arange(10, 19)
    assert initialise.first_tokens(ids, 3).tolist() == [10, 11, 12]
    assert initialise.strided_tokens(ids, 3).tolist() == [10, 14, 18]
    assert initialise.tiled_tokens(ids[:3], 7).tolist() == [10, 11, 12, 10, 11, 12, 10]
    assert initialise.tiled_tokens(ids, 4).tolist() == [10, 11, 12, 13]


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(SoftPromptError, match="has no tokens"):
        initialise.tiled_tokens(torch.zeros(0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="without a batch"):
        initialise.tiled_tokens(torch.zeros(1, 4, dtype=torch.int64), 3)


def test_vocabulary_tokens_are_distinct_and_never_excluded_ones() -> None:
    tokens = initialise.vocabulary_tokens(20, 17, exclude=(0, 1, 19, 400))
    assert sorted(tokens.tolist()) == list(range(2, 19))
    with pytest.raises(SoftPromptError, match="cannot have 18 tokens: there are only 17"):
        initialise.vocabulary_tokens(20, 18, exclude=(0, 1, 19))


def test_embed_tokens_runs_the_module_and_returns_fp32() -> None:
    embed = torch.nn.Embedding(20, 6, dtype=torch.bfloat16)
    rows = initialise.embed_tokens(lambda ids: embed(ids) * 3, torch.tensor([4, 2]))
    assert rows.dtype == torch.float32 and not rows.requires_grad
    assert torch.equal(rows, (embed.weight[[4, 2]] * 3).float())


def test_random_embedding_has_the_moments_of_the_table() -> None:
    torch.manual_seed(0)
    embed = torch.nn.Embedding(300, 4)
    with torch.no_grad():
        embed.weight.mul_(torch.tensor([0.01, 1.0, 5.0, 0.3])).add_(torch.tensor([2.0, 0.0, -9.0, 0.1]))
    rows = initialise.random_embedding(embed, 300, 4000, generator=torch.Generator().manual_seed(1))
    std, mean = torch.std_mean(embed.weight.detach(), dim=0)
    assert ((rows.mean(0) - mean).abs() < 5 * std / 63).all()
    assert ((rows.std(0) - std).abs() < 5 * std / 89).all()
    with pytest.raises(SoftPromptError, match="vocab_size"):
        initialise.random_embedding(embed, 1, 2)
