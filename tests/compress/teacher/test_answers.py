"""The teacher's answers: where they end, that the batch size does not change them, and how they are sampled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, SilentReporter
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Batch, Example
from softprompt_kernels.compress.teacher.answers import answer, end_tokens, hidden_states
from softprompt_kernels.models import prompted_logits
from softprompt_kernels.prompts import Prefix

QUERIES = [Query("Who?"), Query("What turns the mill?"), Query("Where is it?", "Far."), Query("How many sacks?")]


@pytest.fixture(scope="module")
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Prefix) -> Any:
    chat = ChatFormat(tokenizer)

    def call(queries: list[Query] = QUERIES, **options: Any) -> list[Example]:
        settings = {"new_tokens": 8, "temperature": 1.0, "batch_size": 64, "seed": 0, "reporter": SilentReporter()}
        return answer(model, chat, context, queries, **(settings | options))

    return call


@pytest.fixture
def common_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[frozenset[int]]:
    """Every eighth token ends an answer, so that the rows of a batch end at different steps."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(0, 300, 8))
    yield end_tokens(model, ChatFormat(tokenizer))
    model.generation_config.eos_token_id = before


def greedy(
    model: PreTrainedModel, prefix: Prefix, example: Example, new_tokens: int, ends: frozenset[int]
) -> tuple[int, ...]:
    ids, found = list(example.input_ids), []
    for _ in range(new_tokens):
        found.append(int(prompted_logits(model, torch.tensor([ids + found]), prefix)[0, -1].argmax()))
        if found[-1] in ends:
            break
    return tuple(found)


def test_examples_keep_the_order_of_the_queries_and_given_outputs(ask: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatFormat(tokenizer)
    examples = ask()
    assert [list(example.input_ids) for example in examples] == [chat.query_ids(query.input) for query in QUERIES]
    assert list(examples[2].output_ids) == chat.output_ids("Far.")
    assert all(1 <= example.targets <= 8 for example in examples)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_stops_at_its_first_end_token(ask: Any, common_end: frozenset[int], temperature: float) -> None:
    examples = ask([Query(f"Question {index}") for index in range(24)], temperature=temperature, new_tokens=12)
    lengths = {example.targets for example in examples}
    assert len(lengths) > 2, "rows end at different steps"
    for example in examples:
        assert not common_end & set(example.output_ids[:-1])
        assert example.targets == 12 or example.output_ids[-1] in common_end


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_answers_equal_those_of_one_query_alone(
    ask: Any, model: PreTrainedModel, context: Prefix, common_end: frozenset[int], batch_size: int
) -> None:
    for query, example in zip(QUERIES, ask(temperature=0.0, batch_size=batch_size), strict=True):
        if query.output is None:
            assert example.output_ids == greedy(model, context, example, 8, common_end)


def test_the_seed_determines_answers_and_the_callers_random_state_is_kept(ask: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ask(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert ask(seed=3) == first
    assert ask(seed=4) != first


def test_sampling_uses_the_whole_distribution(
    ask: Any, model: PreTrainedModel, context: Prefix, tokenizer: PreTrainedTokenizerBase
) -> None:
    query = Query("Who?")
    ids = torch.tensor([ChatFormat(tokenizer).query_ids(query.input)])
    p = prompted_logits(model, ids, context)[0, -1].double().softmax(-1)
    count = 2000
    drawn = torch.tensor([e.output_ids[0] for e in ask([query] * count, new_tokens=1, batch_size=count)])
    frequencies = torch.bincount(drawn, minlength=300).double() / count
    # The tokens that top-k 50, the default of transformers, would never sample.
    tail = p.argsort(descending=True)[50:]
    assert p[tail].sum() > 0.01
    deviation = (p[tail].sum() * (1 - p[tail].sum()) / count).sqrt()
    assert abs(frequencies[tail].sum() - p[tail].sum()) < 5 * deviation
    top = int(p.argmax())
    assert abs(frequencies[top] - p[top]) < 5 * (p[top] * (1 - p[top]) / count).sqrt()


def test_hidden_states_are_in_the_order_of_the_examples(
    model: PreTrainedModel, context: Prefix, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_kernels.compress.teacher.answers.TOKENS_PER_BATCH", 12)
    found = hidden_states(model, context, examples, SilentReporter(), "")
    for example, rows in zip(examples, found, strict=True):
        expected = Batch.of([example], torch.device("cpu")).hidden(model, context)
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
