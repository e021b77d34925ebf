"""Refinement: its error and gradient, what it may move, and when it keeps what it was given."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_kernels.compress.matching.closed_form import fit_layer
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.matching.refine import RefineRows, batches, match_error, refine

MakeLayer = Callable[..., Any]
Refine = Callable[..., tuple[Tensor, Tensor]]


def refine_rows(layers: list[Any], dtype: torch.dtype = torch.float64) -> RefineRows:
    rows = RefineRows.of([one.rows for one in layers], [split(one.rows, one.key, one.value) for one in layers])
    tensors = (rows.query, rows.rest_out, rows.rest_error, rows.rest_lse, rows.size)
    return RefineRows(*(tensor.to(dtype) for tensor in tensors), rows.scores)


def with_results(rows: RefineRows, layer: int, out: Tensor) -> RefineRows:
    """The rows with other results in one layer."""
    error = rows.rest_error.clone()
    error[layer] = rows.rest_out[layer] - out
    return replace(rows, rest_error=error)


@pytest.fixture
def problem(make_layer: MakeLayer) -> tuple[RefineRows, RefineRows, Tensor, Tensor]:
    """Rows to fit, rows held out, keys and values to start from: two layers, fp32."""
    layers = [make_layer(context=24, count=160, size=8, seed=seed) for seed in (0, 1)]
    rows = refine_rows(layers, torch.float32)
    starts = [fit_layer(one.rows, split(one.rows, one.key, one.value), one.key, one.value, 5) for one in layers]
    key, value = (torch.stack(parts).float() for parts in zip(*starts, strict=True))
    return rows.slice(40, rows.count), rows.slice(0, 40), key, value


def run(problem: tuple[RefineRows, RefineRows, Tensor, Tensor], **changes: Any) -> tuple[Tensor, Tensor]:
    rows, heldout, key, value = problem
    options = {"steps": 30, "learning_rate": 4e-2, "rows_per_step": 64, "frozen_tokens": 1, "rows": rows}
    options |= {"heldout": heldout} | changes
    return refine(key, value, options.pop("rows"), options.pop("heldout"), **options)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_error_is_that_of_textbook_attention(
    make_layer: MakeLayer, textbook_scores: Callable[..., Tensor], softcap: float | None, sinks: bool
) -> None:
    layers = [make_layer(softcap=softcap, sinks=sinks, seed=seed) for seed in (0, 1)]
    key, value = torch.randn(2, 2, 3, 6).double(), torch.randn(2, 2, 3, 5).double()
    found = match_error(refine_rows(layers), key, value)
    for index, one in enumerate(layers):
        table = textbook_scores(one.rows.query, key[index].repeat_interleave(2, 0), one.rows.scores)
        rest = split(one.rows, one.key, one.value)
        joint = torch.cat([table, rest.rest_lse[..., None]], -1).softmax(-1)
        out = joint[..., :3] @ value[index].repeat_interleave(2, 0) + joint[..., 3:] * rest.rest_out
        expected = (out - one.rows.out).square().sum((1, 2)) / one.rows.out.square().sum((1, 2))
        torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-8)


def test_the_context_itself_has_no_error(make_layer: MakeLayer) -> None:
    layer = make_layer(sinks=True, softcap=2.0)
    assert match_error(refine_rows([layer]), layer.key[None], layer.value[None]).max() < 1e-20


@pytest.mark.parametrize("served_by", ["reference", "composed"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_gradient_of_the_error_is_right(
    make_layer: MakeLayer, served_by: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if served_by == "composed" and softcap is not None:
        served_by = "reference"  # the composed backend has no softcap
    monkeypatch.setenv("SOFTPROMPT_BACKEND", served_by)
    rows = refine_rows([make_layer(count=5, size=4, value_size=3, softcap=softcap, seed=seed) for seed in (0, 1)])
    key, value = torch.randn(2, 2, 3, 4).double().requires_grad_(), torch.randn(2, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda k, v: match_error(rows, k, v), (key, value))


def test_the_error_falls(problem: tuple) -> None:
    rows, heldout, key, value = problem
    errors: list[torch.Tensor] = []
    found = run(problem, steps=60, after_step=lambda step, error: errors.append(error))
    assert len(errors) == 60 and errors[-1].sum() < errors[0].sum()
    assert (match_error(rows, *found).sum(1) < 0.8 * match_error(rows, key, value).sum(1)).all()
    assert (match_error(heldout, *found).sum(1) < match_error(heldout, key, value).sum(1)).all()
    assert not found[0].requires_grad and not found[1].requires_grad


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_frozen_tokens_do_not_move(problem: tuple, frozen: int) -> None:
    for new, old in zip(run(problem, frozen_tokens=frozen), problem[2:], strict=True):
        assert torch.equal(new[:, :, :frozen], old[:, :, :frozen])
        assert frozen == 5 or (new[:, :, frozen:] != old[:, :, frozen:]).any()


def test_a_layer_that_gets_worse_on_held_out_rows_keeps_its_start(problem: tuple) -> None:
    """The held-out rows of layer 0 are what its start gives; those of layer 1 agree with the rows."""
    rows, heldout, key, value = problem
    noise = torch.randn(rows.rest_out[0].shape, generator=torch.Generator().manual_seed(3))
    rows = with_results(rows, 0, noise)
    heldout = with_results(heldout, 0, match_results(heldout, key, value)[0])
    new_key, new_value = run(problem, rows=rows, heldout=heldout)
    assert torch.equal(new_key[0], key[0]) and torch.equal(new_value[0], value[0])
    assert not torch.equal(new_key[1], key[1])


def match_results(rows: RefineRows, key: Tensor, value: Tensor) -> Tensor:
    """What a prompt gives these rows."""
    group = rows.query.shape[1] // key.shape[1]
    table = rows.scores.scale * rows.query @ key.repeat_interleave(group, 1).mT
    joint = torch.cat([table, rows.rest_lse[..., None]], -1).softmax(-1)
    return joint[..., :-1] @ value.repeat_interleave(group, 1) + joint[..., -1:] * rows.rest_out


def test_steps_are_reproducible(problem: tuple) -> None:
    first, again = run(problem), run(problem)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_every_row_is_used(problem: tuple) -> None:
    """Where the steps do not divide the rows, two turns leave out different ones."""
    rows = problem[0]
    seen: list[int] = []
    for size in (64, 30, 50, 200):
        seen.clear()
        runs = batches(rows, size)
        for _ in range(8):
            start = next(runs).query.storage_offset() - rows.query.storage_offset()
            seen.append(start // rows.query.stride(2))
        used = {row for start in seen for row in range(start, start + min(size, rows.count))}
        assert used == set(range(rows.count)), size


def test_the_callers_random_state_and_tensors_are_left_alone(problem: tuple) -> None:
    state, before = torch.get_rng_state(), [t.clone() for t in problem[2:]]
    with torch.no_grad():
        run(problem, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, problem[2:], strict=True))


def test_steps_that_diverge_keep_the_start(problem: tuple) -> None:
    new_key, new_value = run(problem, learning_rate=1e30, steps=3)
    assert torch.equal(new_key, problem[2]) and torch.equal(new_value, problem[3])


def test_constant_keys_can_be_refined(problem: tuple) -> None:
    rows, heldout, key, value = problem
    found = run((rows, heldout, torch.zeros_like(key), torch.zeros_like(value)), frozen_tokens=0)
    assert all(tensor.isfinite().all() for tensor in found)
