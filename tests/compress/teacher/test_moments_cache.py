"""The cached targets of the teacher: their values, and when they are not used."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress.sources.sequences import Batch, Example
from softprompt_kernels.compress.teacher import moments_cache as module
from softprompt_kernels.compress.teacher.moments_cache import TargetWriter, read_targets
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import Prefix

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 6)


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


def test_targets_are_read_back_in_any_order_of_writing(
    make_targets: Any, tmp_path: Path, model: PreTrainedModel
) -> None:
    first = make_targets(folder=tmp_path / "targets")
    assert len(first.shards) > 2 and list(first.rows) != sorted(first.rows), "batches are by length"
    again = read_targets(tmp_path / "targets", "this", head_of(model), "moments", 1.0)
    for chosen in (range(7), [3, 1], [6]):
        a, b = first.moments(chosen, CPU), again.moments(chosen, CPU)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.entropy, b.entropy)


def test_targets_of_another_key_are_not_used(make_targets: Any, tmp_path: Path, model: PreTrainedModel) -> None:
    make_targets(folder=tmp_path / "targets")
    assert read_targets(tmp_path / "targets", "that", head_of(model), "moments", 1.0) is None
    assert read_targets(tmp_path / "nowhere", "this", head_of(model), "moments", 1.0) is None


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "no index", "invalid index", "half an index"])
def test_damaged_targets_are_not_used(make_targets: Any, model: PreTrainedModel, tmp_path: Path, damage: str) -> None:
    make_targets(folder=tmp_path / "targets")
    shard, index = tmp_path / "targets/00001.safetensors", tmp_path / "targets/index.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "missing":
        shard.unlink()
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "no index":
        index.unlink()
    elif damage == "invalid index":
        index.write_text("[]")
    else:
        index.write_text(json.dumps({"key": "this"}))
    assert read_targets(tmp_path / "targets", "this", head_of(model), "moments", 1.0) is None


def test_an_interrupted_writer_leaves_no_targets(make_targets: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    make_targets(folder=tmp_path / "targets")
    writer = TargetWriter(tmp_path / "targets", head_of(model), "moments", 1.0)
    writer.add(0, torch.randn(7, model.config.hidden_size))  # a shard is full
    assert read_targets(tmp_path / "targets", "this", head_of(model), "moments", 1.0) is None
