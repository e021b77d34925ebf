"""A batch behind a bank of prompts: each row gets what it gets alone behind its prompt, whoever joins and leaves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import DecodingBatch, DecodingRow, capture, forward, generate, prepare, prompted_logits
from softprompt_kernels.prompts import Prefix

PROMPTS = (0, 9, 4, 13)  # tokens of the prompts; the first is none
LENGTHS = (3, 7, 1, 4, 4, 12)
NEW = 7
FAMILIES = ("llama", "gemma2", "gpt2", "mistral")  # plain, with windows and softcaps, with learned positions


@pytest.fixture
def bank(build: Callable[..., PreTrainedModel], tokens: Callable[..., Tensor]):
    """`bank(family)`: a model, its bank, and each prompt alone (None for no prompt)."""

    def make(family: str) -> tuple[PreTrainedModel, Prefix, list[Prefix | None]]:
        model = build(family)
        prepare(model)
        alone = [capture(model, tokens(1, length, seed=length)) for length in PROMPTS[1:]]
        return model, Prefix.stack([alone[0].slice(0, 0), *alone]), [None, *alone]

    return make


@pytest.fixture
def rows(tokens: Callable[..., Tensor]) -> list[DecodingRow]:
    """Rows of different lengths and prompts; two of them are equal."""
    made = [
        DecodingRow(tuple(tokens(length, seed=seed).tolist()), seed % len(PROMPTS), temperature=0)
        for seed, length in enumerate(LENGTHS)
    ]
    return [*made, DecodingRow(made[1].input, made[1].prompt, temperature=0)]


def greedy(model: PreTrainedModel, row: DecodingRow, alone: list[Prefix | None], new: int = NEW) -> list[int]:
    found = generate(model, torch.tensor([row.input]), alone[row.prompt], do_sample=False, max_new_tokens=new)
    return found[0, len(row.input) :].tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_prompts_get_what_generate_gives_each_alone(bank, rows, family, packed, monkeypatch):
    monkeypatch.setattr(forward, "packs_sequences", lambda *_: packed)
    model, prefix, alone = bank(family)
    batch = DecodingBatch(model, prefix, len(rows))
    batch.join(rows[:3])
    batch.step()
    batch.join(rows[3:])
    for _ in range(NEW - 1):
        batch.step()
    for row in rows:
        assert row.tokens == greedy(model, row, alone, len(row.tokens))
    assert {len(row.tokens) for row in rows} == {NEW, NEW + 1}


def test_rows_that_leave_in_the_middle_change_nothing_for_the_others(bank, rows):
    model, prefix, alone = bank("llama")
    batch = DecodingBatch(model, prefix, 4)
    batch.join(rows[:4])
    batch.step()
    batch.leave([rows[0], rows[2], rows[5]])  # the last one is not in the batch
    assert batch.free == 2
    batch.join(rows[4:6])
    for _ in range(NEW - 2):
        batch.step()
    assert [len(row.tokens) for row in rows[:6]] == [2, NEW, 2, NEW, NEW - 1, NEW - 1]
    for row in rows[:6]:
        assert row.tokens == greedy(model, row, alone, len(row.tokens))
    batch.clear()
    assert (batch.free, batch.cache.columns) == (4, 0)


def test_each_row_samples_with_its_own_settings_whatever_is_beside_it(bank, rows):
    model, prefix, _ = bank("llama")
    settings = [(0.0, 1.0), (0.7, 1.0), (1.3, 0.6), (1.0, 1.0), (0.7, 0.3), (2.0, 0.0)]

    def fresh() -> list[DecodingRow]:
        return [
            DecodingRow(row.input, row.prompt, (5, number), *settings[number]) for number, row in enumerate(rows[:6])
        ]

    def run(batches: list[list[DecodingRow]]) -> None:
        for some in batches:
            batch = DecodingBatch(model, prefix, 6)
            batch.join(some)
            for _ in range(NEW - 1):
                batch.step()

    together, apart = fresh(), fresh()
    run([together])
    run([[row] for row in apart])
    assert [row.tokens for row in together] == [row.tokens for row in apart]
    other = DecodingRow(together[3].input, together[3].prompt, (6, 3), 1.0)
    run([[other]])
    assert other.tokens != together[3].tokens


def test_the_cache_doubles_up_to_the_longest_row(bank, tokens):
    model, prefix, _ = bank("llama")
    columns = []
    for longest in (None, 140):
        batch = DecodingBatch(model, prefix, 1, longest=longest)
        batch.join([DecodingRow(tuple(tokens(128).tolist()), temperature=0)])
        batch.step()
        columns.append(batch.cache.columns)
    assert columns == [256, 192]


def test_scores_are_the_log_probabilities_of_the_model(bank, rows):
    model, prefix, alone = bank("llama")
    for number, row in enumerate(rows[:4]):
        row.top_scores = (None, 0, 2, 5)[number]
    batch = DecodingBatch(model, prefix, 4)
    batch.join(rows[:4])
    batch.step()
    assert [len(row.scores) for row in rows[:4]] == [0, 2, 2, 2]
    for row in rows[1:4]:
        ids = torch.tensor([[*row.input, *row.tokens[:-1]]])
        expected = prompted_logits(model, ids, alone[row.prompt])[0, -2:].log_softmax(-1)
        for score, token, logprobs in zip(row.scores, row.tokens, expected, strict=True):
            assert score.logprob == pytest.approx(float(logprobs[token]), abs=1e-5)
            values, tokens = logprobs.topk(row.top_scores)
            assert [token for token, _ in score.top] == tokens.tolist()
            assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_a_row_whose_logits_are_not_finite_fails_alone(bank, rows):
    model, prefix, alone = bank("llama")
    broken = Prefix(tuple((key.clone(), value.clone()) for key, value in prefix.layers), prefix.lengths)
    broken.layers[0][1][1] = torch.nan  # prompt 1, which rows 1, 5 and 6 read
    batch = DecodingBatch(model, broken, len(rows))
    batch.join(rows)
    assert [row.failed for row in rows] == [row.prompt == 1 for row in rows]
    batch.leave([row for row in rows if row.failed])
    batch.step()
    assert all(row.tokens == greedy(model, row, alone, 2) for row in rows if not row.failed)


def test_equal_inputs_share_a_run_only_behind_the_same_prompt(bank, rows):
    model, prefix, _ = bank("llama")
    shapes: list[tuple[int, ...]] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    same = [DecodingRow((3, 4, 5), prompt, temperature=0) for prompt in (1, 1, 2)]
    batch = DecodingBatch(model, prefix, 3)
    batch.join(same)
    assert shapes == [(2, 3)]
    assert same[0].tokens == same[1].tokens


def test_room_and_what_fits_next(bank):
    model, prefix, _ = bank("llama")
    batch = DecodingBatch(model, prefix, 3)
    window = model.config.max_position_embeddings
    assert [batch.room(prompt) for prompt in range(4)] == [window - length for length in PROMPTS]
    assert DecodingBatch(model, None, 1).room(0) == window
    long, short = DecodingRow((3,) * 1000), DecodingRow((4,) * 30)
    assert batch.fitting([short] * 9) == 3
    assert batch.fitting([long, long, short]) == 2, "equal inputs behind one prompt count once"
    assert batch.fitting([long, DecodingRow(long.input, 1), short]) == 1
    assert batch.fitting([]) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got 0 rows, accepted is 1 to 2"),
        ([DecodingRow((3,))] * 3, "got 3 rows"),
        ([DecodingRow((3,)), DecodingRow(())], r"new\[1\]: got 0 tokens"),
        ([DecodingRow((3,), prompt=4)], r"new\[0\]: got 1 tokens behind prompt 4, accepted .* behind prompt 0 to 3"),
    ],
    ids=["none", "too many", "empty", "unknown prompt"],
)
def test_bad_rows_are_refused_and_none_of_them_has_joined(bank, rows, message):
    model, prefix, _ = bank("llama")
    batch = DecodingBatch(model, prefix, 2)
    with pytest.raises(SoftPromptError, match=message):
        batch.join(rows)
    assert batch.free == 2
    with pytest.raises(SoftPromptError, match="size: got 0"):
        DecodingBatch(model, prefix, 0)
