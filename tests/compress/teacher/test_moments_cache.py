"""The cached targets of the teacher: their values, when they are reused, and when they are computed again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.sources.sequences import Batch, Example
from softprompt_kernels.compress.teacher import moments_cache as module
from softprompt_kernels.compress.teacher.moments_cache import Targets, cached_targets
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.prompts import Prefix

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXAMPLES_PER_SHARD", 2)


@pytest.fixture
def make_targets(tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example]) -> Any:
    def call(
        identity: Any = "this", examples: list[Example] = examples, head: Head | None = None, **options: Any
    ) -> Targets:
        settings = {"form": "moments", "temperature": 1.0, "reporter": SilentReporter()} | options
        return cached_targets(
            tmp_path / "cache", {"of": identity}, model, head or head_of(model), context, examples, **settings
        )

    return call


@pytest.fixture
def teacher_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of examples, for each time that the teacher runs."""
    runs: list[int] = []
    original = module.hidden_states

    def recorded(*args: Any, **options: Any) -> list[torch.Tensor]:
        runs.append(len(args[2]))
        return original(*args, **options)

    monkeypatch.setattr(module, "hidden_states", recorded)
    return runs


def hidden_of(model: PreTrainedModel, context: Prefix, examples: list[Example]) -> torch.Tensor:
    return torch.cat([Batch.of([example], CPU).hidden(model, context) for example in examples])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_moments_equal_those_of_the_teachers_distribution(
    make_targets: Any,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    temperature: float,
    biased: bool,
) -> None:
    head = head_of(model)
    if biased:
        head = replace(head, bias=torch.randn(300, generator=torch.Generator().manual_seed(1)))
    chosen = [5, 0, 3, 3, 6]
    moments = make_targets(temperature=temperature, head=head).moments(chosen, CPU)
    weight, bias = head.weight.double(), torch.zeros(300).double() if head.bias is None else head.bias.double()
    hidden = hidden_of(model, context, [examples[i] for i in chosen]).double()
    log_p = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    p = log_p.exp()
    torch.testing.assert_close(moments.mean.double(), p @ weight, rtol=0, atol=2e-5)
    torch.testing.assert_close(moments.entropy.double(), -(p * log_p).sum(-1), rtol=0, atol=2e-4)
    assert moments.temperature == temperature
    if biased:
        torch.testing.assert_close(moments.bias_mean.double(), p @ bias, rtol=0, atol=2e-5)
    else:
        assert moments.bias_mean is None


def test_hidden_states_are_stored_unchanged(
    make_targets: Any, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    chosen = [6, 1, 2]
    rows = make_targets(form="hidden").hidden(chosen, CPU)
    torch.testing.assert_close(rows, hidden_of(model, context, [examples[i] for i in chosen]), rtol=0, atol=1e-5)


def test_the_teacher_runs_once(make_targets: Any, teacher_runs: list[int]) -> None:
    first = make_targets().moments(range(7), CPU)
    assert teacher_runs == [2, 2, 2, 1]
    again = make_targets().moments(range(7), CPU)
    assert len(teacher_runs) == 4
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.entropy, again.entropy)


def test_other_examples_model_form_or_temperature_are_computed_again(
    make_targets: Any, teacher_runs: list[int], examples: list[Example]
) -> None:
    other = [*examples[:-1], Example(examples[-1].input_ids, (*examples[-1].output_ids, 9))]
    for options in ({}, {"identity": "that"}, {"examples": other}, {"form": "hidden"}, {"temperature": 2.0}):
        teacher_runs.clear()
        make_targets(**options)
        assert len(teacher_runs) == 4, options


def test_a_change_of_one_token_changes_the_targets(make_targets: Any, examples: list[Example]) -> None:
    before = make_targets().moments([6], CPU).mean
    changed = replace(examples[6], input_ids=(9, *examples[6].input_ids[1:]))
    after = make_targets(examples=[*examples[:6], changed]).moments([6], CPU).mean
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "no index", "invalid index"])
def test_a_damaged_cache_is_computed_again(
    make_targets: Any, teacher_runs: list[int], tmp_path: Path, damage: str
) -> None:
    expected = make_targets().moments(range(7), CPU).mean.clone()
    shard, index = tmp_path / "cache" / "targets-00001.safetensors", tmp_path / "cache" / "index.json"
    teacher_runs.clear()
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "missing":
        shard.unlink()
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text("[]")
    assert torch.equal(make_targets().moments(range(7), CPU).mean, expected)
    assert len(teacher_runs) == 4


def test_an_interrupted_computation_leaves_no_cache(
    make_targets: Any, teacher_runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_targets()
    recorded = module.hidden_states

    def stopped(*args: Any, **options: Any) -> list[torch.Tensor]:
        if len(teacher_runs) == 6:
            raise KeyboardInterrupt
        return recorded(*args, **options)

    monkeypatch.setattr(module, "hidden_states", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_targets(identity="that")
    monkeypatch.setattr(module, "hidden_states", recorded)
    teacher_runs.clear()
    make_targets()
    assert len(teacher_runs) == 4, "the index of the first set must not be used for half of the second"
