"""Requests by OpenAI's own client: chats and plain text, whole and streamed, to the prompt that `model` names."""

import time
from dataclasses import replace

import openai
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from softprompt_kernels.models import generate
from tests.serve.conftest import LENGTHS, alone

NEW = 12
NAMES = ("base", *(f"prompt-{number}" for number in range(len(LENGTHS))), "run")
ASK = [{"role": "user", "content": "Who?"}]
TURNS = [*ASK, {"role": "assistant", "content": "Ada."}, {"role": "user", "content": "Since when?"}]


def greedy(bank, name: str, ids: list[int], chat: bool = True, new: int = NEW) -> str:
    """From `generate`, behind the prompt alone."""
    served = bank.served[name]
    prefix = alone(bank, served.chat_row if chat else served.text_row)
    tokens = generate(bank.model, torch.tensor([ids]), prefix, do_sample=False, max_new_tokens=new)
    return bank.decode(tokens[0, len(ids) :].tolist())


def emptied(http, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        health = http.get("../health").json()
        if health["running"] + health["waiting"] == 0:
            return
        time.sleep(0.01)
    raise AssertionError(health)


def test_the_models_are_the_base_and_the_prompts(client):
    models = client.models.list().data
    assert [model.id for model in models] == list(NAMES)
    assert [model.prompt_tokens for model in models] == [0, *LENGTHS, 11]
    assert client.models.retrieve("run").id == "run"
    assert models[1].max_tokens == 300


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_is_answered_behind_the_prompt_that_it_names(client, bank, name):
    chat = bank.served[name].chat
    for messages, ids in ((ASK, chat.query_ids("Who?")), (TURNS, chat.conversation_ids(TURNS))):
        reply = client.chat.completions.create(model=name, messages=messages, max_tokens=NEW, temperature=0)
        choice = reply.choices[0]
        assert (reply.model, choice.finish_reason, choice.message.role) == (name, "length", "assistant")
        assert choice.message.content == greedy(bank, name, ids)
        tokens = bank.served[name].tokens
        assert reply.usage.prompt_tokens == tokens + len(ids)
        assert reply.usage.prompt_tokens_details.cached_tokens == tokens
        assert reply.usage.completion_tokens == NEW


def test_a_stream_gives_the_same_text_in_pieces(client):
    request = {"model": "prompt-2", "messages": ASK, "temperature": 0}
    whole = client.chat.completions.create(**request, max_completion_tokens=40)
    chunks = list(
        client.chat.completions.create(
            **request, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(map(bool, texts)) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert (
        client.chat.completions.create(**request, max_tokens=3, stream=True)
        .response.headers["content-type"]
        .startswith("text/event-stream")
    )


def test_plain_text_is_continued_behind_the_prompt(client, bank):
    for name in ("base", "prompt-1"):
        ids = bank.text_ids("the house", bank.served[name])
        for prompt in ("the house", ids):
            reply = client.completions.create(model=name, prompt=prompt, max_tokens=NEW, temperature=0)
            assert reply.choices[0].text == greedy(bank, name, ids, chat=False)
    several = client.completions.create(model="run", prompt=["a", "bc"], n=2, max_tokens=4, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in several.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3] == greedy(
        bank, "run", bank.text_ids("bc", bank.served["run"]), False, 4
    )
    assert several.usage.prompt_tokens == 3 + 2 * 11
    assert len(client.completions.create(model="base", prompt="x", temperature=0).usage.model_dump()) > 0
    chunks = list(client.completions.create(model="run", prompt="bc", max_tokens=4, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[2]


def test_only_without_a_prompt_the_tokenizer_adds_its_own_tokens(bank):
    begins = replace(bank)
    start = bank.tokenizer.bos_token
    begins._backend.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, bank.tokenizer.bos_token_id)]
    )
    plain = bank.text_ids("ab", bank.served["run"])
    assert begins.text_ids("ab", bank.served["run"]) == plain
    assert begins.text_ids("ab", bank.served["base"]) == [bank.tokenizer.bos_token_id, *plain]


def test_sampling_follows_the_seed_and_the_temperature(client):
    request = {"model": "prompt-0", "messages": ASK, "max_tokens": 16}

    def texts(**settings) -> list[str]:
        return [each.message.content for each in client.chat.completions.create(**request, **settings).choices]

    first = texts(seed=3, n=3, temperature=1.2)
    assert len(set(first)) == 3
    assert texts(seed=3, n=3, temperature=1.2) == first
    assert texts(seed=-4, n=3, temperature=1.2) != first
    assert texts() != texts(), "without a seed each request has another"
    assert texts(seed=3, top_p=0) == texts(temperature=0)


def test_stop_strings_end_an_answer_before_them(client):
    request = {"model": "prompt-3", "messages": ASK, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    stop = whole[6:8]
    for given in (stop, ["never!", stop]):
        choice = client.chat.completions.create(**request, stop=given).choices[0]
        assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = list(client.chat.completions.create(**request, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_log_probabilities_come_with_the_tokens(client, bank):
    request = {"model": "prompt-4", "max_tokens": 5, "temperature": 0}
    reply = client.chat.completions.create(**request, messages=ASK, logprobs=True, top_logprobs=3).choices[0]
    scored = reply.logprobs.content
    assert len(scored) == 5
    for each in scored:
        assert each.logprob == each.top_logprobs[0].logprob and len(each.top_logprobs) == 3
        assert each.bytes is None or bytes(each.bytes).decode() == each.token
    chunks = client.chat.completions.create(**request, messages=ASK, logprobs=True, stream=True)
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in scored], abs=1e-4)
    text = client.completions.create(**request, prompt="x", logprobs=1).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.top_logprobs) == 5
    assert text.text_offset == [sum(map(len, text.tokens[:n])) for n in range(5)]
    chunks = list(client.completions.create(**request, prompt="x", logprobs=1, stream=True))
    offsets = [offset for chunk in chunks if (found := chunk.choices[0].logprobs) for offset in found.text_offset]
    assert offsets == text.text_offset


def test_a_client_that_goes_away_frees_its_place(client, http, server, monkeypatch):
    step = server.engine._batch.step
    monkeypatch.setattr(server.engine._batch, "step", lambda: time.sleep(0.03) or step())  # 7 seconds an answer
    request = {"model": "prompt-5", "messages": ASK, "max_tokens": 250, "temperature": 0}
    with client.chat.completions.create(**request, stream=True) as stream:
        next(iter(stream))
        assert http.get("../health").json()["running"] == 1
    emptied(http, seconds=3)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).chat.completions.create(**request | {"n": 8})
    emptied(http, seconds=3)


def test_a_failed_answer_is_an_error_whole_and_streamed(client, server, monkeypatch, http):
    def broken() -> None:
        raise RuntimeError("broken")

    request = {"model": "base", "messages": ASK, "max_tokens": 9, "temperature": 0}
    expected = client.chat.completions.create(**request)
    with monkeypatch.context() as patched:
        patched.setattr(server.engine._batch, "step", broken)
        with pytest.raises(openai.InternalServerError, match="internal error"):
            client.chat.completions.create(**request)
        with pytest.raises(openai.APIError, match="internal error"):
            list(client.chat.completions.create(**request, stream=True))
    assert client.chat.completions.create(**request).choices == expected.choices
    emptied(http)
