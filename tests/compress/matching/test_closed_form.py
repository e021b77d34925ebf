"""The prompt in closed form: importance, choice of keys, masses, values, and what degenerate layers give."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_kernels.compress.matching import closed_form as module
from softprompt_kernels.compress.matching.closed_form import VALUE_RIDGE, choose_keys, fit_layer, key_importance
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.teacher.rows import LayerRows

MakeLayer = Callable[..., Any]
Scores = Callable[..., Tensor]
KINDS = {
    "plain": {},
    "grouped heads": {"heads": 6, "kv_heads": 2},
    "softcap": {"softcap": 1.5},
    "sink": {"sinks": True},
    "window": {"window": 7},
    "window and softcap": {"window": 4, "softcap": 1.5},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def fitted(layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    return fit_layer(layer.rows, split(layer.rows, layer.key, layer.value), layer.key, layer.value, tokens)


def mass_error(layer: Any, key: Tensor, scores: Scores) -> float:
    """Σ a² (Σ_j exp(score_ij − Λ_i) − 1)² over all rows."""
    group = layer.rows.query.shape[0] // key.shape[0]
    table = scores(layer.rows.query, key.repeat_interleave(group, 0), layer.rows.scores)
    sums = (table - layer.parts.context_lse[..., None]).exp().sum(-1)
    return float((layer.parts.share.square() * (sums - 1).square()).nan_to_num(0.0).sum())


def test_importance_is_the_sum_of_squared_weights(make_layer: MakeLayer, kind: dict[str, Any]) -> None:
    layer = make_layer(**kind)
    squares = layer.parts.share[..., None].square() * layer.weights.square()
    expected = squares.unflatten(0, (layer.key.shape[0], -1)).sum((1, 2))
    parts = split(layer.rows, layer.key, layer.value)
    torch.testing.assert_close(key_importance(layer.rows, parts, layer.key), expected, rtol=1e-4, atol=1e-10)


def test_the_most_important_keys_and_the_first_are_chosen() -> None:
    importance = torch.tensor([[0.1, 5.0, 2.0, 7.0, 1.0], [9.0, 0.0, 0.0, 0.0, 3.0]])
    assert choose_keys(importance, 3).tolist() == [[0, 1, 3], [0, *choose_keys(importance, 3)[1, 1:].tolist()]]
    assert 4 in choose_keys(importance, 3)[1]
    assert choose_keys(importance, 1).tolist() == [[0], [0]]


def test_equal_importance_gives_different_keys() -> None:
    chosen = choose_keys(torch.ones(2, 6), 4)
    assert all(len(set(row)) == 4 and row == sorted(row) and row[0] == 0 for row in chosen.tolist())
    unseen = choose_keys(torch.zeros(1, 6), 3)
    assert unseen[0, 0] == 0 and len(set(unseen[0].tolist())) == 3


def test_a_first_key_that_no_query_sees_is_not_chosen() -> None:
    assert choose_keys(torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0]]), 2).tolist() == [[3, 4]]


@pytest.mark.parametrize("tokens", [9, 12])
def test_as_many_tokens_as_the_context_are_the_context(make_layer: MakeLayer, tokens: int) -> None:
    layer = make_layer()
    key, value = fitted(layer, tokens)
    assert torch.equal(key, layer.key) and torch.equal(value, layer.value)


def test_one_key_of_a_pair_of_duplicates_takes_the_mass_of_both(
    make_layer: MakeLayer, textbook_scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "choose_keys", lambda importance, tokens: torch.arange(8).expand(2, 8))
    # All queries of a head have the same part along a direction that keys can use, so q·u = 1 can be satisfied.
    layer = make_layer(count=60, size=8, duplicate=True, common=0.3)
    layer.rows.query[..., 0] = 4.0
    layer.key[..., 0] = 0.0
    out, lse, _ = context_attention(layer, textbook_scores, layer.key, layer.value)
    rows = replace(layer.rows, lse=torch.logaddexp(lse, torch.zeros_like(lse)), out=out * 0.5)
    key, value = fit_layer(rows, split(rows, layer.key, layer.value), layer.key, layer.value, 8)
    new_out, new_lse, _ = context_attention(layer, textbook_scores, key, value)
    plain_out, plain_lse, _ = context_attention(layer, textbook_scores, layer.key[:, :-1], layer.value[:, :-1])
    assert (new_lse - lse).abs().max() < 0.05 * (plain_lse - lse).abs().max()
    assert (new_out - out).abs().max() < 0.05 * (plain_out - out).abs().max()


def context_attention(layer: Any, scores: Scores, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = layer.rows.query.shape[0] // key.shape[0]
    table = scores(layer.rows.query, key.repeat_interleave(group, 0), layer.rows.scores)
    weights = table.softmax(-1)
    return weights @ value.repeat_interleave(group, 0), table.logsumexp(-1), weights


@pytest.mark.parametrize("seed", range(3))
def test_masses_in_keys_come_nearer_to_the_contexts(make_layer: MakeLayer, textbook_scores: Scores, seed: int) -> None:
    layer = make_layer(context=30, count=50, size=8, seed=seed)
    parts = split(layer.rows, layer.key, layer.value)
    chosen = choose_keys(key_importance(layer.rows, parts, layer.key), 6)
    picked = torch.stack([key[index] for key, index in zip(layer.key, chosen, strict=True)])
    key, _ = fit_layer(layer.rows, parts, layer.key, layer.value, 6)
    assert mass_error(layer, key, textbook_scores) < 0.7 * mass_error(layer, picked, textbook_scores)


@pytest.mark.parametrize("chunk", [module.CHUNK_ELEMENTS, 50])
def test_values_solve_their_normal_equations(
    make_layer: MakeLayer,
    textbook_scores: Scores,
    kind: dict[str, Any],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    layer, k = make_layer(count=30, **kind), 4
    parts = split(layer.rows, layer.key, layer.value)
    chosen = choose_keys(key_importance(layer.rows, parts, layer.key), k)
    key, value = fit_layer(layer.rows, parts, layer.key, layer.value, k)
    heads, count, _ = layer.rows.query.shape
    group, window = heads // len(key), layer.rows.scores.window
    for g in range(len(key)):
        gram, right = torch.zeros(k, k).double(), torch.zeros(k, value.shape[2]).double()
        start = layer.value[g, chosen[g]]
        for h in range(g * group, (g + 1) * group):
            for i in range(count):
                row = textbook_scores(layer.rows.query[h, i : i + 1], key[g], layer.rows.scores)[0]
                seen = torch.tensor([window is None or k + int(layer.rows.offset[i]) - j < window for j in range(k)])
                if not seen.any():
                    continue
                p = row.masked_fill(~seen, -torch.inf).softmax(-1)
                weight = layer.parts.share[h, i] ** 2
                gram += weight * p[:, None] * p
                right += weight * p[:, None] * (layer.parts.context_out[h, i] - p @ start)
        ridge = VALUE_RIDGE * gram.diagonal().mean()
        step = value[g] - start
        torch.testing.assert_close(gram @ step + ridge * step, right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_number_of_tokens_is_finite(make_layer: MakeLayer, kind: dict[str, Any], tokens: int) -> None:
    key, value = fitted(make_layer(**kind), tokens)
    assert key.shape == (2, tokens, 6) and value.shape == (2, tokens, 5)
    assert key.isfinite().all() and value.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_rows_than_tokens_are_finite(make_layer: MakeLayer, count: int) -> None:
    key, value = fitted(make_layer(count=count), 8)
    assert key.isfinite().all() and value.isfinite().all()


def test_a_layer_whose_queries_never_look_at_the_context_keeps_chosen_tokens(make_layer: MakeLayer) -> None:
    layer = make_layer(context=20)
    rows = LayerRows(*(t.float() for t in (layer.rows.query, layer.rows.out)), layer.rows.lse.float() + 1000.0,
                     layer.rows.offset, layer.rows.scores)  # fmt: skip
    parts = split(rows, layer.key.float(), layer.value.float())
    assert (parts.share == 0).all()
    key, value = fit_layer(rows, parts, layer.key.float(), layer.value.float(), 5)
    for g in range(2):
        for new, old in zip(key[g], value[g], strict=True):
            at = (layer.key[g].float() == new).all(-1).nonzero().flatten().tolist()
            assert len(at) == 1 and torch.equal(layer.value[g, at[0]].float(), old)
    assert torch.equal(key[:, 0], layer.key[:, 0].float())


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_equal_keys_are_finite(make_layer: MakeLayer, tokens: int) -> None:
    layer = make_layer()
    layer.key[:] = layer.key[:, :1]
    layer.value[:] = layer.value[:, :1]
    rows = LayerRows(*(t.float() for t in (layer.rows.query, layer.rows.out, layer.rows.lse)), layer.rows.offset,
                     layer.rows.scores)  # fmt: skip
    key, value = fit_layer(rows, split(rows, layer.key.float(), layer.value.float()), layer.key, layer.value, tokens)
    assert key.dtype == value.dtype == torch.float32
    assert key.isfinite().all() and value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_in_16_bits_give_a_prompt_in_fp32(make_layer: MakeLayer, dtype: torch.dtype) -> None:
    layer = make_layer(count=30)
    rows = LayerRows(*(t.float() for t in (layer.rows.query, layer.rows.out, layer.rows.lse)), layer.rows.offset,
                     layer.rows.scores)  # fmt: skip
    key, value = layer.key.to(dtype), layer.value.to(dtype)
    new_key, new_value = fit_layer(rows, split(rows, key, value), key, value, 4)
    same_key, same_value = fit_layer(rows, split(rows, key.float(), value.float()), key.float(), value.float(), 4)
    assert new_key.dtype == new_value.dtype == torch.float32
    torch.testing.assert_close(new_key, same_key, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(new_value, same_value, rtol=1e-3, atol=1e-3)
