"""The context's part of a layer's attention and the rest, against textbook attention in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from softprompt_kernels.compress.matching.parts import split, visible_runs
from softprompt_kernels.errors import SoftPromptError

KINDS = {
    "plain": {},
    "grouped heads": {"heads": 6, "kv_heads": 2},
    "one head for all": {"heads": 4, "kv_heads": 1},
    "softcap": {"softcap": 1.5},
    "sink": {"sinks": True},
    "window": {"window": 7},
    "window that hides the context from some rows": {"window": 4},
    "window, softcap and sink": {"window": 5, "softcap": 1.5, "sinks": True},
    "window that hides nothing": {"window": 40},
}
MakeLayer = Callable[..., Any]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def test_parts_are_those_of_textbook_attention(make_layer: MakeLayer, kind: dict[str, Any]) -> None:
    layer = make_layer(common=0.2, **kind)
    found = split(layer.rows, layer.key, layer.value)
    clear = layer.parts.share < 0.99  # elsewhere the rest is cut to the size of the values
    assert clear.double().mean() > 0.8
    for name in ("context_out", "context_lse", "rest_out", "rest_lse", "share"):
        expected = getattr(layer.parts, name)
        got = getattr(found, name)
        torch.testing.assert_close(got[clear], expected[clear], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_together_give_the_result_and_the_sum(make_layer: MakeLayer, kind: dict[str, Any]) -> None:
    layer = make_layer(common=0.2, **kind)
    found = split(layer.rows, layer.key, layer.value)
    share, clear = found.share[..., None], layer.parts.share < 0.99
    mixed = share * found.context_out + (1 - share) * found.rest_out
    torch.testing.assert_close(mixed[clear], layer.rows.out[clear])
    torch.testing.assert_close(torch.logaddexp(found.context_lse, found.rest_lse), layer.rows.lse)


def test_a_row_that_sees_none_of_the_context_is_all_rest(make_layer: MakeLayer) -> None:
    layer = make_layer(window=4)
    found = split(layer.rows, layer.key, layer.value)
    blind = layer.rows.offset >= 3
    assert blind.any() and not blind.all()
    assert (found.share[:, blind] == 0).all() and (found.context_lse[:, blind] == -torch.inf).all()
    assert (found.context_out[:, blind] == 0).all()
    assert torch.equal(found.rest_out[:, blind], layer.rows.out[:, blind])
    assert (found.share[:, ~blind] > 0).all()


def test_rows_see_the_context_in_runs(make_layer: MakeLayer) -> None:
    layer = make_layer(window=7, context=9, own=6, count=12)
    seen = torch.zeros(12, 9, dtype=torch.bool)
    for index, keys in visible_runs(layer.rows, 9):
        seen[index, keys] = True
    assert torch.equal(seen, layer.weights[0] > 0)
    plain = make_layer()
    assert list(visible_runs(plain.rows, 9)) == [(slice(None), slice(0, 9))]


def test_a_row_that_looks_at_the_context_alone_has_a_finite_rest(make_layer: MakeLayer) -> None:
    layer = make_layer()
    alone = replace(layer.rows, out=layer.parts.context_out * 1.001, lse=layer.parts.context_lse - 1e-7)
    found = split(alone, layer.key, layer.value)
    assert (found.share < 1).all() and found.rest_lse.isfinite().all()
    assert found.rest_out.abs().max() <= max(layer.value.abs().max(), alone.out.abs().max())


@pytest.mark.parametrize("name", ["query", "out", "lse", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(make_layer: MakeLayer, name: str, number: float) -> None:
    layer = make_layer()
    tensor = getattr(layer if name in ("key", "value") else layer.rows, name)
    tensor.view(-1)[3] = number
    with pytest.raises(SoftPromptError, match="behind the context are not finite"):
        split(layer.rows, layer.key, layer.value)
