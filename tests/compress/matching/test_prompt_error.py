"""The error of a prompt in one layer against textbook attention, with a window too, and what `match` stores of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.matching.match import Matching, match, stored_error
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.matching.prompt_error import prompt_error

MakeLayer = Callable[..., Any]


@pytest.mark.parametrize("window", [None, 7, 4])
def test_the_error_is_that_of_textbook_attention(
    make_layer: MakeLayer, textbook_scores: Callable[..., Tensor], window: int | None
) -> None:
    layer = make_layer(window=window, sinks=True)
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(2, 3, size, generator=generator, dtype=torch.float64) for size in (6, 5))
    parts = split(layer.rows, layer.key, layer.value)
    found = prompt_error(layer.rows, parts, key, value, 8)
    table = textbook_scores(layer.rows.query, key.repeat_interleave(2, 0), layer.rows.scores)
    if window is not None:  # a query at position 3 + offset sees the last `window` positions, its own too
        hidden = 3 + layer.rows.offset[:, None] - torch.arange(3) >= window
        assert hidden.any()
        table = table.masked_fill(hidden, -torch.inf)
    joint = torch.cat([table, parts.rest_lse[..., None]], -1).softmax(-1)
    out = joint[..., :3] @ value.repeat_interleave(2, 0) + joint[..., 3:] * parts.rest_out
    square = (out - layer.rows.out).square().sum(-1)[:, :8].mean(1)
    torch.testing.assert_close(found.double(), square / layer.rows.out.square().sum(-1).mean(1), rtol=1e-4, atol=1e-8)


def test_the_context_itself_has_no_error(make_layer: MakeLayer) -> None:
    layer = make_layer(window=7)
    assert prompt_error(layer.rows, split(layer.rows, layer.key, layer.value), layer.key, layer.value, 12).max() < 1e-12


@pytest.mark.parametrize("rows", [100, 30], ids=["refined", "too few rows to refine"])
@pytest.mark.parametrize("steps", [0, 30])
def test_the_error_of_every_group_is_stored(
    make_layer: MakeLayer, stored: Callable[[Sequence[Any]], Any], tmp_path: Path, rows: int, steps: int
) -> None:
    context, recorded = stored([make_layer(context=20, count=rows, seed=seed) for seed in range(3)])
    prompt = match(context, recorded, Matching(5, steps, 1), reporter=SilentReporter(), folder=tmp_path, key="this")
    found = stored_error(context, tmp_path, "this")
    assert found is not None
    for index, (key, value) in enumerate(context.layers):
        layer = recorded.layer(index, context.device)
        own_key, own_value = (tensor[0] for tensor in prompt.layers[index])
        expected = prompt_error(layer, split(layer, key[0], value[0]), own_key, own_value, recorded.heldout)
        torch.testing.assert_close(found[index], expected, rtol=1e-3, atol=1e-6)
    assert stored_error(context, tmp_path, "other") is None
