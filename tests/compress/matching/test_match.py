"""All layers: groups and their files, progress and records, bad input, and what is allocated."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.matching import match as module
from softprompt_kernels.compress.matching.closed_form import fit_layer
from softprompt_kernels.compress.matching.match import Matching, match, stored_match
from softprompt_kernels.compress.matching.parts import split
from softprompt_kernels.compress.teacher.rows import Rows
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.prompts import Prefix

MakeLayer = Callable[..., Any]
SETTINGS = Matching(tokens=5, steps=3, frozen_tokens=1)


@pytest.fixture
def problem(make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]]) -> tuple[Prefix, Rows]:
    """Three layers of one kind with 100 rows."""
    return stored([make_layer(context=20, count=100, seed=seed) for seed in range(3)])


def run(problem: tuple[Prefix, Rows], settings: Matching = SETTINGS, **options: Any) -> Prefix:
    return match(*problem, settings, **{"reporter": SilentReporter()} | options)


def assert_equal(one: Prefix, other: Prefix) -> None:
    for pairs in zip(one.layers, other.layers, strict=True):
        for a, b in zip(*pairs, strict=True):
            assert torch.equal(a, b)


def one_layer_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", 1)


def test_without_steps_each_layer_is_in_closed_form(problem: tuple[Prefix, Rows]) -> None:
    context, rows = problem
    found = run(problem, Matching(5, 0, 1))
    assert found.rows == 1 and found.length == 5 and found.dtype == torch.float32 and found.num_layers == 3
    for index, (key, value) in enumerate(context.layers):
        layer = rows.layer(index, context.device)
        expected = fit_layer(layer, split(layer, key[0], value[0]), key[0], value[0], 5)
        for a, b in zip(found.layers[index], expected, strict=True):
            torch.testing.assert_close(a[0], b, rtol=1e-5, atol=1e-6)


def test_groups_of_any_size_give_the_same_closed_form(
    problem: tuple[Prefix, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(problem, Matching(5, 0, 1))
    one_layer_a_group(monkeypatch)
    assert_equal(run(problem, Matching(5, 0, 1)), whole)


def test_groups_of_any_size_are_refined(problem: tuple[Prefix, Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers do not depend on each other; only the rows that a step draws depend on the group."""
    start = run(problem, Matching(5, 0, 1))
    settings = Matching(5, 30, 1)
    whole = run(problem, settings)
    one_layer_a_group(monkeypatch)
    apart = run(problem, settings)
    for found in (whole, apart):
        moved = [not torch.equal(a, b) for (a, _), (b, _) in zip(found.layers, start.layers, strict=True)]
        assert any(moved)
        for (key, _), (old, _) in zip(found.layers, start.layers, strict=True):
            assert torch.equal(key[:, :, :1], old[:, :, :1])
    # Both groups that begin with layer 0 draw the same rows.
    for one, other in zip(whole.layers[0], apart.layers[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_matching_is_reproducible(problem: tuple[Prefix, Rows]) -> None:
    assert_equal(run(problem), run(problem))


class Counter:
    """Counts the groups that are computed; raises before the group after `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> None:
        self.groups: list[list[int]] = []
        original = module._match_group

        def counted(context: Any, rows: Any, settings: Any, group: range, *others: Any) -> Any:
            if len(self.groups) == most:
                raise KeyboardInterrupt
            self.groups.append(list(group))
            return original(context, rows, settings, group, *others)

        monkeypatch.setattr(module, "_match_group", counted)


def test_finished_groups_are_not_done_again(
    problem: tuple[Prefix, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_layer_a_group(monkeypatch)
    counter = Counter(monkeypatch)
    first = run(problem, folder=tmp_path, key="this")
    assert counter.groups == [[0], [1], [2]]
    assert_equal(run(problem, folder=tmp_path, key="this"), first)
    assert len(counter.groups) == 3
    again = stored_match(problem[0], tmp_path, "this")
    assert again is not None
    assert_equal(again, first)
    assert stored_match(problem[0], tmp_path, "that") is None


def test_an_interruption_keeps_the_groups_before_it(
    problem: tuple[Prefix, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_layer_a_group(monkeypatch)
    expected = run(problem)
    with monkeypatch.context() as patch:
        Counter(patch, most=1)
        with pytest.raises(KeyboardInterrupt):
            run(problem, folder=tmp_path, key="this")
    assert stored_match(problem[0], tmp_path, "this") is None
    counter = Counter(monkeypatch)
    assert_equal(run(problem, folder=tmp_path, key="this"), expected)
    assert counter.groups == [[1], [2]]


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "of another key", "of other layers", "no layers"])
def test_a_damaged_or_foreign_group_is_done_again(
    problem: tuple[Prefix, Rows], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_layer_a_group(monkeypatch)
    expected = run(problem, folder=tmp_path, key="this")
    path = tmp_path / "matched-00001.safetensors"
    key, value = (tensor.contiguous() for tensor in expected.layers[1])
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "of another key":
        save_file({"key": key + 1, "value": value}, path, {"key": "that"})
    elif damage == "of other layers":
        twice = {"key": torch.cat([key, key]), "value": torch.cat([value, value])}
        save_file(twice, path, {"key": "this"})
    else:
        save_file({"key": key[:0], "value": value[:0]}, path, {"key": "this"})
        assert stored_match(problem[0], tmp_path, "this") is None
    counter = Counter(monkeypatch)
    assert_equal(run(problem, folder=tmp_path, key="this"), expected)
    assert counter.groups == [[1]]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("tokens", "steps"), [(5, 3), (5, 0), (20, 3)])
def test_progress_adds_up(
    problem: tuple[Prefix, Rows], recording_reporter: type, tmp_path: Path, tokens: int, steps: int
) -> None:
    for _ in range(2):  # the second time from the files
        reporter = recording_reporter()
        run(problem, Matching(tokens, steps, 1), reporter=reporter, folder=tmp_path, key=f"{tokens} {steps}")
        assert reporter.done == {"Matching": 3 * (steps + 1)}


def test_each_step_is_recorded(problem: tuple[Prefix, Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[dict[str, Any]] = []
    run(problem, record=records.append)
    one_layer_a_group(monkeypatch)
    run(problem, record=records.append)
    assert {tuple(one) for one in records} == {("stage", "first_layer", "layers", "step", "error", "seconds")}
    found = [(one["stage"], one["first_layer"], one["layers"], one["step"]) for one in records]
    assert found == [("matching", first, layers, step) for first, layers in ((0, 3), (0, 1), (1, 1), (2, 1))
                     for step in (1, 2, 3)]  # fmt: skip
    assert all(0 < one["error"] < 10 and 0 <= one["seconds"] < 60 for one in records)


def test_layers_of_different_shapes_and_score_functions(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[dict[str, Any]] = [{}, {"size": 4}, {"size": 4}, {"window": 6}, {"softcap": 2.0}, {"kv_heads": 1}]
    problem = stored([make_layer(context=20, count=70, **kind) for kind in kinds])
    counter = Counter(monkeypatch)
    found = run(problem)
    assert counter.groups == [[0], [1, 2], [3], [4], [5]]
    for (key, value), kind in zip(found.layers, kinds, strict=True):
        assert key.shape == (1, kind.get("kv_heads", 2), 5, kind.get("size", 6))
        assert key.isfinite().all() and value.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, 19, 20])
@pytest.mark.parametrize("count", [1, 3, 63, 64])
def test_any_number_of_rows_and_tokens_is_finite(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]], tokens: int, count: int
) -> None:
    problem = stored([make_layer(context=20, count=count, window=window) for window in (None, 9)])
    for tensor in (tensor for pair in run(problem, Matching(tokens, 2, 1)).layers for tensor in pair):
        assert tensor.shape[2] == tokens and tensor.isfinite().all()


def test_few_rows_are_not_refined(make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]]) -> None:
    records: list[dict[str, Any]] = []
    problem = stored([make_layer(context=20, count=63)])
    assert_equal(run(problem, record=records.append), run(problem, Matching(5, 0, 1)))
    assert not records


@pytest.mark.parametrize("degenerate", ["never looks at the context", "equal keys", "zero queries", "zero values"])
def test_degenerate_layers_are_finite(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]], degenerate: str
) -> None:
    layer = make_layer(context=20, count=80)
    if degenerate == "never looks at the context":
        layer.rows.lse.add_(500.0)
    elif degenerate == "equal keys":
        layer.key[:], layer.value[:] = layer.key[:, :1].clone(), layer.value[:, :1].clone()
    elif degenerate == "zero queries":
        layer.rows.query.zero_()
    else:
        layer.value.zero_()
        layer.rows.out.zero_()
    problem = stored([layer])
    for tokens in (1, 5, 19):
        for pair in run(problem, Matching(tokens, 3, 1)).layers:
            assert all(tensor.isfinite().all() for tensor in pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_context_in_16_bits(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]], dtype: torch.dtype
) -> None:
    layers = [make_layer(context=20, count=100, seed=seed) for seed in range(2)]
    found = run(stored(layers, dtype), Matching(5, 0, 1))
    exact = run(stored(layers), Matching(5, 0, 1))
    for (key, value), (same_key, _) in zip(found.layers, exact.layers, strict=True):
        assert key.dtype == value.dtype == torch.float32
        assert key.isfinite().all() and value.isfinite().all()
        # The choice of keys may differ, but not by much.
        assert (key - same_key).abs().mean() < same_key.abs().mean()


def test_a_prompt_has_to_fit_the_dtype_of_the_model_and_not_that_of_its_context(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]]
) -> None:
    layer = make_layer(context=20, count=70)
    layer.value.mul_(1e6)
    run(stored([layer]))
    with pytest.raises(SoftPromptError, match=r"do not fit into torch\.float16"):
        run(stored([layer]), model=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16))


@pytest.mark.parametrize("name", ["query", "out", "key", "value"])
def test_numbers_that_are_not_finite_give_one_sentence(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]], name: str
) -> None:
    layer = make_layer(context=20, count=70)
    getattr(layer if name in ("key", "value") else layer.rows, name)[1, 2, 3] = float("inf")
    with pytest.raises(SoftPromptError, match="are not finite, accepted are finite numbers"):
        run(stored([layer]))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns, other than views."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("window", [None, 4000])
def test_nothing_of_the_size_of_rows_times_context_is_allocated(
    make_layer: MakeLayer, stored: Callable[..., tuple[Prefix, Rows]], window: int | None
) -> None:
    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    count, length = 512, 4096
    layer = make_layer(heads=2, kv_heads=1, size=8, value_size=8, context=length, count=count, window=window)
    problem = stored([layer])
    with Largest() as seen:
        run(problem, Matching(16, 2, 1))
    assert length * 8 <= seen.elements < count * length / 4
