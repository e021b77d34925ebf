"""Requests that are refused: with OpenAI's error object, the right status and what is accepted. The server lives on."""

import asyncio
import json

import openai
import pytest

from softprompt_kernels.serve import Options, Work, serving
from softprompt_kernels.serve.engine import Failed
from softprompt_kernels.serve.gate import Gate
from tests.serve.conftest import KEY

ASK = [{"role": "user", "content": "Who?"}]
CHAT = {"model": "base", "messages": ASK, "max_tokens": 2}
TEXT = {"model": "base", "prompt": "x", "max_tokens": 2}
SYSTEM = {"role": "system", "content": "Be kind."}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.fixture(autouse=True)
def _lives_on(client):
    yield
    assert client.chat.completions.create(**CHAT, temperature=0).usage.completion_tokens == 2


def refused(response, status: int, message: str, param: str | None = None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "got none, accepted is at least one"),
        ({"messages": None}, "messages", "messages: got None"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages.0.role: got 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages", "messages.0.content: missing"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages", "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "UTF-8"),
        ({"messages": [*ASK, {"role": "assistant", "content": "A."}]}, "messages", "accepted is 'user'"),
        ({"messages": [SYSTEM, *ASK]}, "messages", "got a system message"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages", "too long: 419 tokens"),
        ({"max_tokens": 290}, "max_tokens", "accepted are 300 together"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: got 0"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens: got '5'"),
        ({"max_completion_tokens": 3}, None, "another number than max_completion_tokens"),
        ({"temperature": 2.5}, "temperature", "temperature: got 2.5"),
        ({"temperature": float("nan")}, "temperature", "temperature: got nan"),
        ({"top_p": -0.1}, "top_p", "top_p: got -0.1"),
        ({"n": 17}, "n", "accepted are 16 together"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"seed": 2**70}, "seed", "seed: got"),
        ({"top_logprobs": 21}, "top_logprobs", "top_logprobs: got 21"),
        ({"presence_penalty": 0.5}, "presence_penalty", "got 0.5, but this is not supported, accepted is 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_k": 5}, "top_k", "top_k: this parameter is not supported"),
        ({"\ud800": 5}, None, "accepted is a JSON object"),
        ({"model": 5}, "model", "model: got 5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_parameter_that_cannot_be_served_is_named(http, changes, param, message):
    body = json.dumps(CHAT | changes)
    response = http.post("chat/completions", content=body, headers={"Content-Type": "application/json"})
    refused(response, 400, message, param)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "got no tokens"),
        ({"prompt": []}, "accepted is a text, a list of token ids"),
        ({"prompt": [["a"]]}, "accepted is a text, a list of token ids"),
        ({"prompt": "\ud800"}, "UTF-8"),
        ({"prompt": [3, 300]}, "accepted are token ids from 0 to 299"),
        ({"prompt": [3, -1]}, "accepted are token ids from 0 to 299"),
        ({"prompt": "x" * 300}, "too long"),
        ({"prompt": ["x"] * 17}, "accepted are 16 together"),
        ({"echo": True}, "echo: got True, but this is not supported"),
        ({"best_of": 2}, "best_of: got 2, but this is not supported"),
        ({"suffix": "x"}, "suffix: got 'x', but this is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_plain_text_has_parameters_of_its_own(http, changes, message):
    body = json.dumps(TEXT | changes)
    response = http.post("completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"", "accepted is a JSON object"),
        (b"[1]", "accepted is a JSON object"),
        (b"null", "accepted is a JSON object"),
        (b'"x"', "accepted is a JSON object"),
        (b"[" * 15_000, "parsing the body"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "pars"),
    ],
)
def test_what_is_no_json_object_is_refused(http, body, message):
    response = http.post("chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_other_bodies_and_places_are_refused(http):
    json_type = {"Content-Type": "application/json"}
    refused(http.post("chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 400, "text/plain")
    refused(http.post("completions", content=b" " * 20_001, headers=json_type), 413, "larger than 20000 bytes")
    in_parts = (b" " * 5000 for _ in range(5))  # without a length in its head
    refused(http.post("completions", content=in_parts, headers=json_type), 413, "larger than 20000 bytes")
    refused(http.get("nothing"), 404, "GET /v1/nothing")
    refused(http.get("chat/completions"), 405, "Method Not Allowed")
    refused(http.get("models/..%2fx"), 404, "got '../x', served are base, prompt-0", "model")
    for path in ("../docs", "../openapi.json"):
        assert http.get(path).status_code == 404


def test_an_unknown_model_is_told_which_there_are(client):
    with pytest.raises(openai.NotFoundError, match=r"got 'other', served are base, prompt-0, .*, run") as error:
        client.chat.completions.create(**CHAT | {"model": "other"})
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1], "ключ"])
def test_without_the_key_nothing_is_told(http, key):
    header = {"Authorization": f"Bearer {key}".encode()} if key else {"Authorization": ""}
    response = http.get("models", headers=header)
    refused(response, 401, "Authorization: Bearer KEY")
    assert KEY not in response.text
    assert http.post("completions", content=b"x" * 50_000, headers=header).status_code == 401
    assert http.get("../health", headers=header).status_code == 200


def test_parameters_that_change_nothing_are_accepted(client, http):
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "frequency_penalty": 0.0,
        "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "tools": [],
        "tool_choice": "none", "stop": None, "seed": None, "temperature": 0, "stream": False, "n": 1, "logprobs": False,
    }  # fmt: skip
    reply = client.chat.completions.create(**CHAT, **harmless)
    again = [*ASK, reply.choices[0].message, *ASK]  # as OpenAI's client gives it back
    assert client.chat.completions.create(**CHAT | {"messages": again}, temperature=0).usage.completion_tokens == 2
    parts = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]}]
    same = client.chat.completions.create(**CHAT | {"messages": parts}, temperature=0)
    assert same.choices[0].message.content == reply.choices[0].message.content
    origin = http.get("models", headers={"Origin": "http://example.com"})
    assert not [name for name in origin.headers if name.startswith("access-control")]


def test_a_full_queue_says_when_to_come_again(bank, client):
    with (
        serving(bank, work=Work(batch_size=1, queue=1)) as small,
        openai.OpenAI(base_url=small.address, api_key="none", max_retries=0) as other,
    ):
        long = {"model": "base", "messages": ASK, "max_tokens": 450, "temperature": 0}
        with other.chat.completions.create(**long, stream=True), other.chat.completions.create(**long, stream=True):
            with pytest.raises(openai.RateLimitError, match="2 answers are in work or wait") as error:
                other.chat.completions.create(**long)
            assert error.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="accepted are 2 together"):
            other.chat.completions.create(**long | {"n": 3})


def test_system_messages_are_joined_if_the_server_says_so(bank, client, http):
    with (
        serving(bank, Options(system="join")) as joining,
        openai.OpenAI(base_url=joining.address, api_key="none", max_retries=0) as other,
    ):
        request = {"model": "prompt-1", "max_tokens": 8, "temperature": 0}
        joined = other.chat.completions.create(**request, messages=[SYSTEM, *ASK]).choices[0].message.content
        by_hand = [{"role": "user", "content": "Be kind.\n\nWho?"}]
        assert joined == client.chat.completions.create(**request, messages=by_hand).choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="got none"):
            other.chat.completions.create(**request, messages=[SYSTEM])
        # A page in a browser that points a name of its own at this machine.
        root = joining.address.removesuffix("v1")
        refused(http.get(root + "v1/models", headers={"Host": "example.com:80"}), 403, "got 'example.com:80'")
        for host in ("LocalHost", "127.0.0.1:5", "127.0.0.2", "[::1]:9"):
            assert http.get(root + "v1/models", headers={"Host": host}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch, caplog):
    """After its time the request is refused. At the end of the server it is cut, with one line in the log."""
    refusals: list[Failed] = []

    async def nothing(*_: object) -> None:
        await asyncio.Event().wait()

    def refuse(failed: Failed):
        async def app(*_: object) -> None:
            refusals.append(failed)

        return app

    async def run(seconds: float) -> None:
        monkeypatch.setattr("softprompt_kernels.serve.gate._SECONDS", seconds)
        gate = Gate(nothing, refuse=refuse, key=None, only_loopback=False, most_bytes=9)
        head = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": head}
        task = asyncio.create_task(gate(scope, nothing, nothing))
        await asyncio.sleep(0.02)
        task.cancel()
        await task

    asyncio.run(run(0.001))
    assert [failed.status for failed in refusals] == [408] and not caplog.messages
    asyncio.run(run(60))
    assert len(refusals) == 1 and caplog.messages == ["a request was cut: its client did not send or read"]
