"""Textbook attention of one layer in float64, from its formulas, without any code of the package under test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from softprompt_kernels.compress.matching.parts import Parts
from softprompt_kernels.compress.teacher.rows import LayerRows, Rows
from softprompt_kernels.models.tap import ScoreFunction
from softprompt_kernels.prompts import Prefix

# The tiny models of all families, under the same names.
from tests.models.conftest import build, family, padded, tokens  # noqa: F401


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's context and rows, and what attention over context and own tokens gives.

    Args:
        key, value: of the context, `[Hkv, C, D]` and `[Hkv, C, Dv]`.
        rows: what a recorder would have stored.
        parts: the textbook's.
        weights: P `[Hq, n, C]`, the softmax over the context alone; 0 for a key that the row does not see.
    """

    key: Tensor
    value: Tensor
    rows: LayerRows
    parts: Parts
    weights: Tensor


def score(query: Tensor, key: Tensor, scores: ScoreFunction) -> Tensor:
    """Scores of `query [.., n, D]` and `key [.., k, D]`, `[.., n, k]`, without a window."""
    raw = scores.scale * torch.einsum("...nd,...kd->...nk", query, key)
    return raw if scores.softcap is None else scores.softcap * torch.tanh(raw / scores.softcap)


def mean_of(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax mean of the values, log of the sum and weights; 0, −inf and 0 for a row of −inf."""
    total = scores.logsumexp(-1)
    weights = (scores - total[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("...k,...kv->...v", weights, values), total, weights


def _make_layer(
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 6,
    value_size: int = 5,
    context: int = 9,
    count: int = 12,
    own: int = 6,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    common: float = 1.0,
    duplicate: bool = False,
    seed: int = 0,
) -> Layer:
    """Rows at offsets 0 to own − 1, each of a sequence of its own. The queries of a head have `common` in common.

    With `duplicate` the last key and value of the context are those of the token before it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scores = ScoreFunction(size**-0.5, softcap, window)
    query = draw(heads, count, size) + common * 3 * draw(heads, 1, size)
    key, value = draw(kv_heads, context, size), draw(kv_heads, context, value_size)
    if duplicate:
        key[:, -1], value[:, -1] = key[:, -2], value[:, -2]
    own_key, own_value = draw(kv_heads, count, own, size), draw(kv_heads, count, own, value_size)
    sink = draw(heads) if sinks else None
    offset = torch.arange(count) % own
    group = heads // kv_heads
    # Each query sees itself and the tokens before it, and of these the last `window` ones.
    distance_behind = context + offset[:, None] - torch.arange(context)
    distance_beside = offset[:, None] - torch.arange(own)
    reach = math.inf if window is None else window
    behind = score(query, key.repeat_interleave(group, 0), scores).masked_fill(distance_behind >= reach, -math.inf)
    beside = score(query[:, :, None], own_key.repeat_interleave(group, 0), scores)[:, :, 0]
    beside = beside.masked_fill((distance_beside < 0) | (distance_beside >= reach), -math.inf)
    behind_values = value.repeat_interleave(group, 0)[:, None].expand(-1, count, -1, -1)
    beside_values = own_value.repeat_interleave(group, 0)
    if sink is not None:  # one more term of the sum, with the value 0
        beside = torch.cat([beside, sink[:, None, None].expand(-1, count, 1)], -1)
        beside_values = torch.cat([beside_values, torch.zeros(heads, count, 1, value_size).double()], 2)
    context_out, context_lse, weights = mean_of(behind, behind_values)
    rest_out, rest_lse, _ = mean_of(beside, beside_values)
    out, lse, _ = mean_of(torch.cat([behind, beside], -1), torch.cat([behind_values, beside_values], 2))
    parts = Parts(context_out, context_lse, rest_out, rest_lse, (context_lse - lse).exp())
    return Layer(key, value, LayerRows(query, out, lse, offset, scores), parts, weights)


@pytest.fixture
def make_layer() -> Callable[..., Layer]:
    return _make_layer


@pytest.fixture
def textbook_scores() -> Callable[[Tensor, Tensor, ScoreFunction], Tensor]:
    """`textbook_scores(query [n, D], key [k, D], scores)`: `[n, k]`, without a window."""
    return score


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[Prefix, Rows]]:
    """`stored(layers, dtype)`: the context and the rows of several layers, as a recorder writes them."""

    def write(layers: Sequence[Any], dtype: torch.dtype = torch.float32) -> tuple[Prefix, Rows]:
        path, tensors = tmp_path / "rows-00000.safetensors", {"offset": layers[0].rows.offset}
        for index, one in enumerate(layers):
            for name, kept in (("query", dtype), ("out", dtype), ("lse", torch.float32)):
                tensors[f"{name}.{index}"] = getattr(one.rows, name).transpose(0, 1).to(kept).contiguous()
        save_file(tensors, path)
        context = Prefix.of((one.key[None].to(dtype), one.value[None].to(dtype)) for one in layers)
        count = layers[0].rows.count
        scores = tuple(one.rows.scores for one in layers)
        return context, Rows((path,), scores, layers[0].rows.query.shape[0], torch.arange(count), count // 10)

    return write
