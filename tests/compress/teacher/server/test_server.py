"""Answers of a server: a real one over HTTP, that gives ids or text, fails, hangs, or holds another model."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import CompressConfig, compress, load_model, plan
from softprompt_kernels.compress.inputs import identity, load_inputs
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.compress.teacher.server import answers as answers_module
from softprompt_kernels.compress.teacher.server import client as client_module
from softprompt_kernels.compress.teacher.server.answers import answer_tokens, stored_answers
from softprompt_kernels.compress.teacher.server.client import Completion, check_packages
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import sample

Make = Callable[..., CompressConfig]
pytestmark = [pytest.mark.usefixtures("no_plot", "one_thread")]
SHARP = 40.0
"""Factor of the tiny model's logits: its own are nearly uniform, and any text would look like its own."""


@pytest.fixture(scope="module")
def sharp_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, sure of what it says."""
    model, tokenizer = load_model(str(tiny_model_folder))
    folder = tmp_path_factory.mktemp("sharp")
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARP)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded_sharp(sharp_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(str(sharp_folder))


class Fake(ThreadingHTTPServer):
    """A server of a model. `behave` is called before each completion, with its number, and may return a status."""

    daemon_threads = True

    def __init__(self, loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = loaded
        self.names, self.says, self.ids, self.takes_ids, self.shift = ["tiny"], "tiny", True, True, 0
        self.behave: Callable[[int], int | None] = lambda number: None
        self.headers: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.running = self.most = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.tokenizer(body["prompt"])["input_ids"]
        ends, limit = set(body["stop_token_ids"]), body["max_tokens"]
        [found] = sample(
            self.model,
            [ids],
            None,
            new_tokens=limit,
            temperature=body["temperature"],
            end_tokens=ends,
            seed=body["seed"],
        )
        tokens = [(token + self.shift) % 256 if token not in ends else token for token in found.tokens]
        ended = tokens[-1] in ends
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length", "logprobs": None}
        if self.ids:
            choice["token_ids"] = tokens
        return {"id": "1", "object": "text_completion", "created": 1, "model": self.says, "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in self.server.names]
        self.reply(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append(body)
            number = len(self.server.requests)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            status = self.server.behave(number)
            if status is None and not self.server.takes_ids and isinstance(body["prompt"], list):
                status = 422
            if status is None:
                with self.server.lock:
                    answer = self.server.complete(body)
                self.reply(200, answer)
            else:
                self.reply(status, {"error": {"message": "not now", "code": status}})
        finally:
            with self.server.lock:
                self.server.running -= 1

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(loaded_sharp: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(client_module, "SHORTEST_WAIT", 0.001)
    monkeypatch.setattr(client_module, "TRIES", 3)
    with Fake(loaded_sharp) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def make(make_config: Make, sharp_folder: Path, server: Fake) -> Make:
    """A run that asks the server, with only the closed form."""

    def with_server(**options: Any) -> CompressConfig:
        asked = {"model": str(sharp_folder), "server": server.address, "steps": 0, "matching_steps": 0}
        return make_config(**(asked | options))

    return with_server


def stored_examples(config: CompressConfig) -> dict[str, Any]:
    return dict(json.loads((config.output / "cache" / "examples.json").read_text()))


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("takes_ids", [True, False])
def test_a_run_takes_its_answers_from_the_server(
    make: Make, server: Fake, ids: bool, takes_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ids, server.takes_ids = ids, takes_ids
    if not ids:  # the tiny model writes bytes that are no text
        monkeypatch.setattr(answers_module, "LARGEST_GAP", float("inf"))
    config = make(new_tokens=8)
    figures = compress(config)
    assert figures["heldout"]["tokens"] > 0
    sent = [body for body in server.requests if isinstance(body["prompt"], list) is takes_ids]
    assert len(sent) >= 6 and {body["max_tokens"] for body in sent} == {8}
    assert sent[0]["top_p"] == 1 and sent[0]["top_k"] == -1
    inputs = load_inputs(config)
    context, ends = inputs.context_ids[0].tolist(), end_tokens(inputs.model, inputs.chat)
    examples = [example for of_set in stored_examples(config).values() for example in of_set]
    if takes_ids:
        assert sorted(body["prompt"] for body in sent) == sorted(context + x for x, _ in examples)
    if ids:
        by_prompt = {tuple(context + x): y for x, y in examples}
        for body in sent:
            prompt = body["prompt"] if takes_ids else server.tokenizer(body["prompt"])["input_ids"]
            expected = server.complete({**body, "prompt": prompt})["choices"][0]["token_ids"]
            assert by_prompt[tuple(prompt)] == expected
    for _, output in examples:
        assert 1 <= len(output) <= 8 and not any(token in ends for token in output[:-1])
    assert not (config.output / "cache" / "server-answers.jsonl").exists()


def test_requests_that_fail_are_repeated_and_no_more_than_asked_run_at_once(make: Make, server: Fake) -> None:
    server.headers["retry-after"] = "0.001"

    def behave(number: int) -> int | None:
        time.sleep(0.01)
        return {1: 500, 2: 429, 5: 503}.get(number)

    server.behave = behave
    compress(make(server_requests=2))
    assert len(server.requests) == 6 + 3
    assert server.most == 2


def test_answers_that_came_are_kept_when_the_server_breaks(make: Make, server: Fake) -> None:
    server.behave = lambda number: None if number <= 3 else 500
    with pytest.raises(SoftPromptError, match=r"answers 500: .*not now"):
        compress(make(server_requests=1))
    assert len(stored_answers(make().output / "cache" / "server-answers.jsonl")) == 3
    server.behave, before = lambda number: None, len(server.requests)
    with (make().output / "cache" / "server-answers.jsonl").open("a") as lines:
        lines.write('{"question": "ab')  # a crash cuts a line off
    figures = compress(make())
    assert len(server.requests) == before + 3
    server.shutdown()
    server.server_close()
    assert compress(make()) == figures  # nothing is left to ask


def test_ctrl_c_keeps_what_came(make: Make, server: Fake, recording_reporter: Any) -> None:
    server.behave = lambda number: time.sleep(0.02 * number)
    with pytest.raises(KeyboardInterrupt):
        compress(make(), recording_reporter("Answers of the server", 2))
    kept = len(stored_answers(make().output / "cache" / "server-answers.jsonl"))
    assert kept == 2
    before = len(server.requests)
    compress(make())
    assert len(server.requests) == before + 6 - kept


def test_a_server_that_hangs_is_left(make: Make, server: Fake) -> None:
    server.behave = lambda number: time.sleep(5)
    begin = time.monotonic()
    with pytest.raises(SoftPromptError, match=r"does not answer within 0\.05 s; a longer server_timeout"):
        compress(make(server_timeout=0.05))
    assert time.monotonic() - begin < 4


def test_text_of_another_model_is_refused(make: Make, server: Fake) -> None:
    server.shift = 1  # each token is the next one
    with pytest.raises(SoftPromptError, match=r"the text of tiny at .* is not that of the local model"):
        compress(make(new_tokens=16))
    assert not (make().output / "evaluation.json").exists()


def test_answers_that_are_none_are_refused(make: Make, server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = server.complete
    for tokens, words in (([], "before its first token; accepted is a server with room for"), ([5, 300], "token 300")):
        choice = {"token_ids": tokens, "text": "", "finish_reason": "length"}
        monkeypatch.setattr(
            server, "complete", lambda body, c=choice: (r := complete(body)) | {"choices": [r["choices"][0] | c]}
        )
        with pytest.raises(SoftPromptError, match=words):
            compress(make())


def test_greedy_answers_of_the_same_model_pass(make: Make, server: Fake) -> None:
    compress(make(new_tokens=16, sample_temperature=0.0))
    assert {body["temperature"] for body in server.requests} == {0.0}


def test_the_name_of_the_model_is_looked_up_before_any_work(make: Make, server: Fake) -> None:
    server.names = ["one", "two"]
    for given, got in (("three", "'three'"), (None, "no name")):
        with pytest.raises(SoftPromptError, match=rf"server_model: got {got}, accepted are .*: one, two"):
            compress(make(server_model=given))
    assert not make().output.exists()
    server.shutdown()
    server.server_close()
    with pytest.raises(SoftPromptError, match=r"server: http://127.* cannot be reached"):
        compress(make())


def test_what_is_no_protocol_of_openai_is_named(make: Make, server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "complete", lambda body: {"answer": 42})
    with pytest.raises(SoftPromptError, match="no response of OpenAI's protocol"):
        compress(make())


def test_a_forecast_asks_nothing_and_the_address_is_not_part_of_the_run(make: Make, server: Fake) -> None:
    assert plan(make()).train_queries > 0
    assert server.requests == []
    inputs = load_inputs(make())
    with Fake((server.model, server.tokenizer)) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        assert identity(load_inputs(make(server=other.address))) == identity(inputs)
        other.shutdown()
    assert identity(load_inputs(make(server=None))) != identity(inputs)


def test_options_of_a_server_need_one(make_config: Make) -> None:
    with pytest.raises(ValueError, match="server_model: got tiny without a server, accepted is none"):
        make_config(server_model="tiny")
    with pytest.raises(ValueError, match="server"):
        make_config(server="localhost:8000")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "find_spec", lambda name: None)
    with pytest.raises(SoftPromptError, match=r'openai and tenacity, .*"\.\[server\]"'):
        check_packages()


def test_tokens_of_an_answer_end_as_the_model_s_own(loaded_sharp: Any) -> None:
    model, tokenizer = loaded_sharp
    chat = ChatFormat(tokenizer)
    ends = end_tokens(model, chat)
    end = chat.output_ids("a")[-1]
    assert end in ends
    for ids, ended, expected in (
        ((5, 6, end), True, (5, 6, end)),
        ((5, 6), True, (5, 6, end)),  # a server that leaves the last token out
        ((5, 6, 7, 8), False, (5, 6, 7, 8)),
        ((5, 6, 7, 8), True, (5, 6, 7, 8)),  # no room for the end
        ((5, 6, 7, 8, 9), False, (5, 6, 7, 8)),
        ((), True, (end,)),
    ):
        assert answer_tokens(chat, Completion("?", ids, ended, "m"), ends, 4) == expected
    text = answer_tokens(chat, Completion("ab", None, True, "m"), ends, 9)
    assert text == tuple(chat.output_ids("ab"))
    assert answer_tokens(chat, Completion("ab", None, False, "m"), ends, 9) == text[: text.index(end)]


def test_the_check_needs_tokens_enough_and_runs_once(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    looks = []
    original = answers_module.surprises_and_entropies
    monkeypatch.setattr(answers_module, "surprises_and_entropies", lambda *a: looks.append(len(a[2])) or original(*a))
    monkeypatch.setattr(answers_module, "CHECKED_TOKENS", 20)
    compress(make())
    assert len(looks) == 1 and 20 <= looks[0] < 36
