"""Rows for matching: what is stored, how many, in which order, and when they are not used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress import SilentReporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher import rows as module
from softprompt_kernels.compress.teacher.answers import watch
from softprompt_kernels.compress.teacher.recording import Recording
from softprompt_kernels.compress.teacher.rows import RowRecorder, Rows, delete_rows, read_rows, row_bytes
from softprompt_kernels.models import FedTokens, QueryTap, forward, sample
from softprompt_kernels.prompts import Prefix

CPU = torch.device("cpu")
TOTAL = sum(length for length in (6, 1, 7, 8, 9, 4, 5))  # tokens of the examples
ONE_ROW = 4 * (8 + 8) * 4 * 2 + 4 * 4 * 2  # bytes: 4 heads of 8 numbers for query and result, and a sum; 2 layers


def record(
    folder: Path, model: PreTrainedModel, context: Prefix, examples: list[Example], rows: int = 1000, **options: Any
) -> Rows:
    settings = {"seed": 0, "key": "this"} | options
    folder.mkdir(exist_ok=True)
    recorder = RowRecorder(folder, rows, row_bytes(context, 4, context.dtype), settings["seed"])
    read(model, context, examples, recorder)
    recorder.close(settings["key"])
    found = read_rows(folder, settings["key"])
    assert found is not None
    return found


def read(model: PreTrainedModel, context: Prefix, examples: list[Example], recorder: RowRecorder) -> None:
    """Let the teacher read the examples, while the recorder watches."""
    recording = Recording(len(examples), rows=recorder)
    watch(model, context, examples, range(len(examples)), recording, SilentReporter(), "")


class Sink:
    """Keeps what each layer hands out."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def put(self, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: object) -> None:
        self.layers[layer] = (query, out, lse)


@torch.no_grad()
def expected_rows(model: PreTrainedModel, context: Prefix, examples: list[Example]) -> list[list[Tensor]]:
    """query, out, lse `[T, ..]` and offset `[T]` of all tokens, by layer: one example at a time, without padding."""
    found: list[list[list[Tensor]]] = [[[], [], [], []] for _ in range(context.num_layers)]
    for example in examples:
        sink = Sink()
        fed = torch.tensor([[*example.input_ids, *example.output_ids[:-1]]])
        forward.prompted_hidden(model, fed, context, tap=QueryTap(torch.arange(fed.shape[1]), sink))
        for layer, tensors in sink.layers.items():
            for parts, tensor in zip(found[layer], (*tensors, torch.arange(fed.shape[1])), strict=True):
                parts.append(tensor)
    return [[torch.cat(parts) for parts in layer] for layer in found]


def sorted_rows(query: Tensor, *others: Tensor) -> list[Tensor]:
    order = query[:, 0, 0].argsort()
    return [tensor[order] for tensor in (query, *others)]


@pytest.mark.parametrize("packed", [True, False])
def test_all_rows_are_those_of_each_example_alone(
    tmp_path: Path,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "packs_sequences", lambda *_: packed)
    rows = record(tmp_path, model, context, examples)
    assert rows.count == TOTAL and rows.query_heads == 4
    for layer, expected in enumerate(expected_rows(model, context, examples)):
        got = rows.layer(layer, CPU)
        assert got.scores == rows.scores[layer] and got.scores.scale == pytest.approx(8**-0.5)
        found = [got.query.transpose(0, 1), got.out.transpose(0, 1), got.lse.transpose(0, 1), got.offset]
        for a, b in zip(sorted_rows(*found), sorted_rows(*expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [1, 7, TOTAL - 1, TOTAL, TOTAL + 1])
def test_the_number_of_rows_is_exact(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example], wanted: int
) -> None:
    rows = record(tmp_path, model, context, examples, wanted)
    assert rows.count == min(wanted, TOTAL)
    assert rows.layer(1, CPU).query.shape == (4, min(wanted, TOTAL), 8)


def test_the_choice_depends_on_the_seed_alone(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    first, again, other = (
        record(tmp_path, model, context, examples, 12, seed=seed).layer(0, CPU).query for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_order_is_random_and_that_of_all_layers(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    rows = record(tmp_path, model, context, examples)
    assert sorted(rows.order.tolist()) == list(range(TOTAL)) != rows.order.tolist()
    layers = [rows.layer(index, CPU) for index in (0, 1)]
    assert torch.equal(layers[0].offset, layers[1].offset)
    first, second = expected_rows(model, context, examples)
    at = (first[0][None] - layers[0].query.transpose(0, 1)[:, None]).abs().sum((2, 3)).argmin(1)
    torch.testing.assert_close(layers[1].query.transpose(0, 1), second[0][at], rtol=1e-4, atol=1e-5)


def test_rows_go_to_several_files(
    tmp_path: Path,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = record(tmp_path, model, context, examples).layer(1, CPU)
    delete_rows(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "BUFFER_BYTES", 1)
    monkeypatch.setattr("softprompt_kernels.compress.teacher.answers.TOKENS_PER_BATCH", 10)
    rows = record(tmp_path, model, context, examples)
    assert len(rows.files) > 2 and all(path.is_file() for path in rows.files)
    split = rows.layer(1, CPU)
    a, b = (sorted_rows(one.query.transpose(0, 1), one.out.transpose(0, 1)) for one in (whole, split))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    delete_rows(tmp_path)
    assert not any(path.exists() for path in rows.files)


def test_the_disk_bounds_the_rows(
    tmp_path: Path,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert row_bytes(context, 4, context.dtype) == ONE_ROW
    monkeypatch.setattr(module, "DISK_BYTES", 2 * 9 * ONE_ROW + 1)
    monkeypatch.setattr(module, "BUFFER_BYTES", 1)
    monkeypatch.setattr("softprompt_kernels.compress.teacher.answers.TOKENS_PER_BATCH", 10)
    rows = record(tmp_path, model, context, examples)
    assert rows.count == 9
    monkeypatch.undo()
    whole = record(tmp_path / "whole", model, context, examples, 9)
    torch.testing.assert_close(rows.layer(0, CPU).query, whole.layer(0, CPU).query, rtol=1e-4, atol=1e-5)
    assert sum(path.stat().st_size for path in tmp_path.glob("rows-*")) < 9 * (ONE_ROW + 24) + 900 * len(rows.files)


def test_rows_of_another_key_are_not_used(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    record(tmp_path, model, context, examples)
    assert read_rows(tmp_path, "that") is None
    assert read_rows(tmp_path / "nowhere", "this") is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "no index", "invalid index", "half an index"])
def test_damaged_rows_are_not_used(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example], damage: str
) -> None:
    shard, index = record(tmp_path, model, context, examples).files[0], tmp_path / "rows.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "missing":
        shard.unlink()
    elif damage == "no index":
        index.unlink()
    elif damage == "invalid index":
        index.write_text("[]")
    else:
        index.write_text(json.dumps({"key": "this"}))
    assert read_rows(tmp_path, "this") is None


def test_an_interrupted_recording_leaves_no_rows(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    record(tmp_path, model, context, examples)
    recorder = RowRecorder(tmp_path, 1000, row_bytes(context, 4, context.dtype), 0)
    read(model, context, examples[:3], recorder)
    recorder._flush()  # without `close`
    assert read_rows(tmp_path, "this") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_16_bit_model_are_stored_in_16_bits_and_read_in_fp32(
    tmp_path: Path, build: Callable[..., PreTrainedModel], examples: list[Example], dtype: torch.dtype
) -> None:
    from softprompt_kernels.models import capture, prepare

    model = build("llama").to(dtype)
    prepare(model)
    context = capture(model, torch.arange(2, 22)[None])
    short = [Example(tuple(i % 50 + 2 for i in e.input_ids), tuple(i % 50 + 2 for i in e.output_ids)) for e in examples]
    rows = record(tmp_path, model, context, short)
    layer = rows.layer(0, CPU)
    assert {t.dtype for t in (layer.query, layer.out, layer.lse)} == {torch.float32}
    assert torch.equal(layer.query, layer.query.to(dtype).float())
    assert sum(path.stat().st_size for path in rows.files) < TOTAL * (row_bytes(context, 4, context.dtype) + 8) + 3000


def test_tokens_after_equal_beginnings_count_once(tmp_path: Path) -> None:
    recorder = RowRecorder(tmp_path, 100, 1, 0)
    fed = [
        FedTokens((0, 1, 2), (1, 2, 3), 0, 0),  # shared by three sequences
        FedTokens((3,), (2,), 0, 3),
        FedTokens((0,), (4,), 3, 4),
        FedTokens((1,), (4,), 3, 5),  # as sequence 0
        FedTokens((2,), (7,), 3, 6),
        FedTokens((3,), (), 1, 7),
    ]
    tap = recorder.tap(fed)
    assert tap is not None and tap.tokens.tolist() == [0, 1, 2, 3, 4, 6]
    assert recorder.tap([FedTokens((4,), (1, 2), 0, 0)]) is None


def test_the_choice_does_not_depend_on_order_or_batches(
    tmp_path: Path,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = record(tmp_path, model, context, examples, 12).layer(0, CPU)
    monkeypatch.setattr("softprompt_kernels.compress.teacher.answers.TOKENS_PER_BATCH", 10)
    again = record(tmp_path, model, context, examples[::-1], 12).layer(0, CPU)
    assert torch.equal(first.offset, again.offset)
    torch.testing.assert_close(first.query, again.query, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [5, 1000])
def test_rows_of_sampled_answers_are_those_of_reading_them(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    model: PreTrainedModel,
    context: Prefix,
    examples: list[Example],
    wanted: int,
) -> None:
    inputs = [example.input_ids for example in examples] * 2
    recorder = RowRecorder(tmp_path, wanted, row_bytes(context, 4, context.dtype), 0)
    sampled = {one.index: one.tokens for one in sample(model, inputs, context, new_tokens=6, recorder=recorder)}
    recorder.close("this")
    rows = read_rows(tmp_path, "this")
    assert rows is not None
    written = [Example(ids, sampled[index]) for index, ids in enumerate(inputs)]
    read_back = record(tmp_path_factory.mktemp("read"), model, context, written, wanted)
    assert (rows.count, rows.heldout) == (read_back.count, read_back.heldout)
    for name in ("query", "out", "lse"):
        pair = (getattr(found.layer(1, CPU), name) for found in (rows, read_back))
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_held_out_rows_come_from_questions_of_their_own(
    tmp_path: Path, model: PreTrainedModel, context: Prefix, examples: list[Example]
) -> None:
    again = [Example(one.input_ids, (*one.output_ids, 9)) for one in examples]
    rows = record(tmp_path, model, context, [*examples, *again])
    stored = []
    for path in rows.files:
        with safe_open(path, framework="pt") as file:
            stored.append(file.get_tensor("question"))
    question = torch.cat(stored)[rows.order]
    assert 0 < rows.heldout < rows.count
    assert not set(question[: rows.heldout].tolist()) & set(question[rows.heldout :].tolist())
