"""Sampling behind a shared prefix: its tokens against `generate` and the softmax, and which tokens the model is fed."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import (
    FedTokens,
    QueryTap,
    capture,
    forward,
    generate,
    prepare,
    prompted_hidden,
    prompted_logits,
    sample,
)
from softprompt_kernels.models.decode.draw import draw
from softprompt_kernels.models.decode.rows import OwnRows
from softprompt_kernels.prompts import Prefix

LENGTHS = (3, 7, 1, 4, 4, 2, 6, 12)  # the last one is longer than the others
NEW = 9


@pytest.fixture
def prepared(build: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    def make(family: str, **changes: object) -> PreTrainedModel:
        model = build(family, **changes)
        prepare(model)
        return model

    return make


@pytest.fixture
def inputs(tokens: Callable[..., Tensor]) -> list[list[int]]:
    return [tokens(length, seed=seed).tolist() for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def fed() -> Callable[[PreTrainedModel], list[tuple[int, ...]]]:
    """`fed(model)`: a list that receives the shape of the ids of every later forward."""

    def watch(model: PreTrainedModel) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        return shapes

    return watch


def run(model: PreTrainedModel, inputs: list[list[int]], prefix: Prefix | None, **options) -> list[tuple[int, ...]]:
    """The new tokens of every input, in the order of the inputs."""
    found = {new.index: new.tokens for new in sample(model, inputs, prefix, **({"new_tokens": NEW} | options))}
    assert sorted(found) == list(range(len(inputs)))
    return [found[index] for index in range(len(inputs))]


def greedy(model: PreTrainedModel, inputs: list[list[int]], prefix: Prefix | None, ends: set[int]) -> list:
    """The same from `generate`, one input at a time."""
    found = []
    for ids in inputs:
        new = generate(model, torch.tensor([ids]), prefix, do_sample=False, max_new_tokens=NEW)[0, len(ids) :].tolist()
        last = next((i for i, token in enumerate(new) if token in ends), NEW - 1)
        found.append(tuple(new[: last + 1]))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_tokens_equal_those_of_generate(family, prepared, tokens, inputs, batch_size):
    model = prepared(family)
    prefix = capture(model, tokens(1, 9))
    plain = greedy(model, inputs, prefix, set())
    ends = {row[step] for step, row in enumerate(plain[:4], start=1)}  # some rows end early, at different steps
    expected = greedy(model, inputs, prefix, ends)
    assert len(set(map(len, expected))) > 1
    options = {"temperature": 0, "end_tokens": ends, "batch_size": batch_size}
    assert run(model, inputs, prefix, **options) == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_and_padded_inputs_give_the_same_tokens(prepared, tokens, inputs, backend, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_BACKEND", backend)
    model = prepared("gemma2")
    prefix = capture(model, tokens(1, 9))
    assert run(model, inputs, prefix, temperature=0, batch_size=4) == greedy(model, inputs, prefix, set())


def test_without_a_prefix_and_without_end_tokens(prepared, inputs):
    model = prepared("mistral")
    assert run(model, inputs, None, temperature=0) == greedy(model, inputs, None, set())


def test_one_new_token_needs_no_decoding_step(prepared, tokens, inputs, fed):
    model = prepared("llama")
    prefix = capture(model, tokens(1, 9))
    expected = [new[:1] for new in greedy(model, inputs, prefix, set())]
    shapes = fed(model)
    assert run(model, inputs, prefix, temperature=0, new_tokens=1, batch_size=3) == expected
    assert len(shapes) == 3
    assert not list(sample(model, [], prefix, new_tokens=4))


def test_buffers_grow_for_inputs_that_join_later(prepared, tokens):
    model = prepared("qwen3", max_position_embeddings=256)
    rows = [tokens(length, seed=length).tolist() for length in (3, 4, 5, 150)]
    prefix = capture(model, tokens(1, 9))
    assert run(model, rows, prefix, temperature=0, batch_size=2) == greedy(model, rows, prefix, set())


@pytest.mark.parametrize("batch_size", [2, 64])
def test_only_tokens_of_the_inputs_and_answers_go_through_the_model(prepared, tokens, inputs, fed, batch_size):
    model = prepared("llama")
    prefix = capture(model, tokens(1, 9))
    ends = set(range(0, 61, 5))
    shapes = fed(model)
    answers = run(model, inputs, prefix, end_tokens=ends, batch_size=batch_size)
    assert any(len(answer) < NEW for answer in answers)
    decoded = [rows for rows, width in shapes if width == 1]
    needed = sum(map(len, inputs)) + sum(len(answer) - 1 for answer in answers)
    assert sum(rows * width for rows, width in shapes) == needed
    assert max(decoded) <= batch_size
    for answer in answers:
        assert not ends & set(answer[:-1])
        assert len(answer) == NEW or answer[-1] in ends


def test_equal_inputs_that_join_together_run_once(prepared, tokens, fed):
    model = prepared("llama")
    prefix, row = capture(model, tokens(1, 9)), tokens(6).tolist()
    alone = run(model, [row], prefix, temperature=0)
    shapes = fed(model)
    assert run(model, [row] * 5, prefix, temperature=0) == alone * 5
    assert shapes[0] == (1, 6)
    assert shapes[1:] == [(5, 1)] * (NEW - 1)
    assert len(set(run(model, [row] * 5, prefix))) > 1, "each has random numbers of its own"


@pytest.mark.parametrize(("family", "together"), [("mistral", True), ("llama", False)])
def test_only_without_windows_do_inputs_join_rows_that_have_grown(prepared, tokens, family, together):
    # The attention of windowed layers is slower for rows of different lengths.
    model, rows = prepared(family), [tokens(2, seed=seed).tolist() for seed in range(8)]
    uneven: list[bool] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: uneven.append(kwargs["softprompt"].key_lengths is not None), with_kwargs=True
    )
    run(model, rows, None, end_tokens=range(0, 61, 6), batch_size=3)
    assert any(uneven) is not together


def test_the_sample_of_an_input_depends_on_the_seed_and_its_tokens_alone(prepared, tokens, inputs):
    model = prepared("llama").double()
    prefix = capture(model, tokens(1, 9))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = run(model, inputs, prefix, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert run(model, inputs, prefix, seed=3) == expected
    assert run(model, inputs, prefix, seed=3, batch_size=2) == expected
    assert run(model, inputs[1:4], prefix, seed=3) == expected[1:4]
    assert run(model, [inputs[0], *inputs], prefix, seed=3)[0] == expected[0]
    assert run(model, [inputs[0], *inputs], prefix, seed=3)[1] != expected[0], "equal inputs are sampled anew"
    assert run(model, inputs, prefix, seed=3, new_tokens=4) == [new[:4] for new in expected]
    assert run(model, inputs, prefix, seed=4) != expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_from_the_softmax(prepared, tokens, temperature):
    model = prepared("gemma2")
    prefix, row, count = capture(model, tokens(1, 9)), tokens(5).tolist(), 3000
    options = {"temperature": temperature, "batch_size": count, "seed": 7}
    drawn = torch.tensor(run(model, [row] * count, prefix, new_tokens=2, **options))
    p = (prompted_logits(model, torch.tensor([row]), prefix)[0, -1].double() / temperature).softmax(-1)
    check_frequencies(drawn[:, 0], p)
    # The second token, after the most frequent first one.
    first = int(p.argmax())
    q = (prompted_logits(model, torch.tensor([[*row, first]]), prefix)[0, -1].double() / temperature).softmax(-1)
    check_frequencies(drawn[drawn[:, 0] == first, 1], q)


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 300, 600])
def test_a_drawn_token_is_the_first_whose_cumulative_probability_exceeds_the_number(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(5, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, 1::3] = -torch.inf
    sums = logits.softmax(-1).cumsum(-1)
    for number in (0.0, 1e-9, 0.3, 0.7, 1 - 1e-9, 1 - 2**-53):
        uniform = torch.full((5,), number, dtype=torch.float64)
        drawn = draw(logits, 1.0, uniform)
        assert logits.gather(1, drawn[:, None]).isfinite().all(), "a token of probability 0"
        assert (sums.gather(1, drawn[:, None])[:, 0] > uniform - 1e-12).all()
        before = torch.where(drawn > 0, sums.gather(1, (drawn - 1).clamp(min=0)[:, None])[:, 0], 0)
        assert (before <= uniform + 1e-12).all()
        rounded = draw(logits.float(), 1.0, uniform)
        assert logits.gather(1, rounded[:, None]).isfinite().all(), "a token of probability 0"


def check_frequencies(drawn: Tensor, p: Tensor) -> None:
    """Pearson's chi-square of the tokens that are expected at least five times; the others count as one."""
    expected, found = p * len(drawn), torch.bincount(drawn, minlength=len(p)).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    freedom = len(expected) - 1
    statistic = float(((found - expected) ** 2 / expected)[expected > 1].sum())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_rows_of_the_cache_take_the_places_of_others():
    cache = OwnRows(3)
    cache.reserve(2)
    key = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 1, 4)
    for column in range(2):
        cache.write(0, key + 10 * column, key[..., :3], torch.tensor([0, 1, 2]) * cache.columns + column)
    cache.reserve(100)
    assert cache.columns == 128
    cache.move([2], [0])
    found, value = cache.read(0, 2, 3)
    assert found.shape == (2, 2, 3, 4)
    assert value.shape == (2, 2, 3, 3)
    assert found[:, 0, :, 0].tolist() == [[2.0, 12.0, 0.0], [1.0, 11.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "new_tokens: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"temperature": -0.5}, "temperature: got -0.5"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"new_tokens": 50}, r"9 prompt \+ 12 input \+ 50 new tokens, the model's window is 64"),
        ({"inputs": [[3], []]}, r"inputs\[1\]: got no tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_any_work(prepared, tokens, inputs, fed, options, message):
    model = prepared("llama")
    prefix = capture(model, tokens(1, 9))
    shapes = fed(model)
    settings = {"inputs": inputs, "new_tokens": NEW} | options
    with pytest.raises(SoftPromptError, match=message):
        sample(model, settings.pop("inputs"), prefix, **settings)
    assert not shapes


def test_a_bank_and_an_unprepared_model_are_refused(build, prepared, tokens, inputs):
    model = prepared("llama")
    with pytest.raises(SoftPromptError, match="prefix: got 2 rows, accepted is one"):
        sample(model, inputs, capture(model, tokens(2, 5)), new_tokens=NEW)
    with pytest.raises(SoftPromptError, match="prepare"):
        sample(build("llama"), inputs, None, new_tokens=NEW)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(prepared, inputs, temperature):
    model = prepared("llama")
    model.lm_head.weight[5] = torch.nan
    with pytest.raises(SoftPromptError, match=r"logits after inputs\[\d\] and 0 new tokens in float32 are not finite"):
        run(model, inputs, None, temperature=temperature)


class Everything:
    """Records all tokens: for each layer and sequence the rows by own position. A `QueryRecorder` and a `QuerySink`."""

    def __init__(self) -> None:
        self.places: list[tuple[tuple[int, ...], int]] = []
        self.rows: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}

    def tap(self, fed: Sequence[FedTokens]) -> QueryTap:
        self.places = [(part.sequences, part.start + index) for part in fed for index in range(len(part.tokens))]
        return QueryTap(torch.tensor([part.place + index for part in fed for index in range(len(part.tokens))]), self)

    def put(self, layer: int, *found: Any) -> None:
        for (sequences, position), *row in zip(self.places, *found[:3], strict=True):
            for sequence in sequences:
                self.rows[layer, sequence, position] = tuple(row)


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_recorded_is_what_the_finished_sequences_give(family, prepared, tokens, inputs, packed, monkeypatch):
    monkeypatch.setattr(forward, "packs_sequences", lambda *_: packed)
    model = prepared(family)
    prefix = capture(model, tokens(1, 9))
    inputs = [*inputs, inputs[1]]  # two sequences share an input
    recorder = Everything()
    found = {new.index: new for new in sample(model, inputs, prefix, new_tokens=NEW, batch_size=4, recorder=recorder)}
    for index, ids in enumerate(inputs):
        fed = torch.tensor([[*ids, *found[index].tokens[:-1]]])
        alone = Everything()
        tap = alone.tap([FedTokens((index,), tuple(fed[0].tolist()), 0, 0)])
        with torch.no_grad():
            hidden = prompted_hidden(model, fed, prefix, tap=tap)
        torch.testing.assert_close(found[index].hidden, hidden[0, len(ids) - 1 :], rtol=1e-4, atol=1e-5)
        for key, row in alone.rows.items():
            torch.testing.assert_close(recorder.rows[key], row, rtol=1e-4, atol=1e-5)
    assert len(recorder.rows) == model.config.get_text_config().num_hidden_layers * sum(
        len(ids) + NEW - 1 for ids in inputs
    )
