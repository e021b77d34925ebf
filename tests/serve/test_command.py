"""`softprompt serve`: what is refused before it starts, and a real process with many clients, one of them killed."""

import argparse
import re
import signal
import socket
import time

import openai
import psutil
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.serve.__main__ import WORDS, Question, judged, measure, server
from softprompt_kernels.cli import app
from softprompt_kernels.compress import load_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture
from softprompt_kernels.prompts import KVPrompt, save
from softprompt_kernels.serve import open_socket, serving


@pytest.fixture
def refused(tiny_model_folder, monkeypatch):
    """`refused(message, *options)`: the command ends with 2 and says so. It never listens."""
    monkeypatch.setattr(socket.socket, "listen", lambda *_: pytest.fail("it listens"))

    def check(message: str, *options: object) -> None:
        words = ["serve", "--model", tiny_model_folder, *options]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, result.output
        assert re.search(message, " ".join(result.output.split())), result.output

    return check


def test_addresses_that_cannot_be_used(refused, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        refused(f"--port: {port} of 127.0.0.1 is in use; choose another one", "--port", port)
    refused("--host: got 'no.such.host.invalid'", "--host", "no.such.host.invalid", "--api-key", "k")
    refused("--host: got 0.0.0.0 without a key", "--host", "0.0.0.0", "--port", 0)
    refused("--api-key: got an empty key", "--api-key", " ")
    monkeypatch.setenv("SOFTPROMPT_API_KEY", "é")
    refused("--api-key: .* accepted are printable ASCII")
    assert "SOFTPROMPT_API_KEY" in CliRunner().invoke(app, ["serve", "--help"]).output


def test_a_port_that_is_taken_while_the_model_loads(bank, monkeypatch):
    def taken(host: str, port: int) -> socket.socket:
        ours, other = open_socket(host, port), socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(ours.getsockname())
        other.listen()
        others.append(other)
        return ours

    others: list[socket.socket] = []
    monkeypatch.setattr("softprompt_kernels.serve.server.open_socket", taken)
    with pytest.raises(SoftPromptError, match="is in use"), serving(bank):
        pytest.fail("it serves")
    others[0].close()


def test_prompts_that_cannot_be_served(refused, prompts, tiny_model_folder, tmp_path):
    one, names = prompts / "prompt-0", ("--port", "0", "--prompt")
    refused("--prompt: got 'folder', accepted is NAME=FOLDER", *names, "folder")
    refused("--prompt: got the name 'a b', accepted are letters", *names, f"a b={one}")
    refused("got the name 'a' twice", *names, f"a={one}", "--prompt", f"a={one}")
    refused("is not a saved prompt", *names, f"a={tmp_path}")
    refused("--prompts: .* is not a folder", "--prompts", tmp_path / "none")
    refused("--prompts: .* has no folder of a saved prompt", "--prompts", tmp_path)
    refused("--base-name: got 'a', the name of a prompt too", *names, f"a={one}", "--base-name", "a")
    model, _ = load_model(str(tiny_model_folder))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save(tmp_path / "other", KVPrompt.from_prefix(capture(model, torch.tensor([[5, 6]]))), model=model)
    refused("other was made for another model", *names, f"a={tmp_path / 'other'}")


def test_without_the_extra_one_sentence_says_what_to_install(refused, monkeypatch):
    found = {"fastapi": None, "uvicorn": object()}
    monkeypatch.setattr("softprompt_kernels.cli.commands.serve.find_spec", lambda name: found[name])
    refused(r'serve needs fastapi: pip install --editable "\.\[serve\]"')


def test_many_clients_a_killed_one_and_the_end_of_a_process(tiny_model_folder, prompts, capsys):
    options = argparse.Namespace(clients=32, prompts=8, tokens=16, seconds=1.5, long=400)
    names = [path.name for path in sorted(prompts.iterdir())]
    questions = [Question(names[i % 8], f"{WORDS[i % 7]} {i}?", 16) for i in range(64)]
    with server(tiny_model_folder, prompts, 24, "--grace", "0.3") as (address, process):
        found = measure(address, psutil.Process(process.pid), questions, options)
        judged(found)  # the ratio of the rates is not a matter of tests: others use the processor too
        shown = capsys.readouterr().out
        assert found.together.answers >= 32 and found.alone.answers > 0
        assert " 0 wrong answers" in f" {shown.splitlines()[-1]}", shown
        assert found.taken == 0
        assert found.memory[1] < 1.1 * found.memory[0]
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            asked = [{"role": "user", "content": "Who?"}]
            stream = client.chat.completions.create(model=names[0], messages=asked, max_tokens=450, n=8, stream=True)
            next(iter(stream))
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            assert process.wait(10) == 128 + signal.SIGTERM
            assert time.monotonic() - start < 10
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
