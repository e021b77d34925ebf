"""What a user can get wrong ends with one sentence on standard error, exit code 2, and nothing half done."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GPTJConfig, GPTJForCausalLM

from softprompt_kernels.errors import SoftPromptError


@pytest.fixture
def refused(run):
    """`refused(*arguments)`: the sentence, after checking how it was said."""

    def check(*arguments: object, **options: object) -> str:
        result = run(*arguments, **options)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, result.stderr
        return errors[0].removeprefix("Error: ")

    return check


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "input"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"caf\xe9", "is not UTF-8 text (byte 3)"),
        (b"word " * 600, "window of 512"),
        (b"a", "tokens: got 500"),
    ],
)
def test_a_context_that_cannot_be_used(refused, inputs, tmp_path, content, fragment):
    tokens = 500 if content == b"a" else 12
    sentence = refused(*inputs.compress(tmp_path / "run", context=written(tmp_path, content), tokens=tokens))
    assert fragment in sentence and not (tmp_path / "run").exists()


def test_a_context_that_is_not_there_or_a_folder(refused, inputs, tmp_path):
    for place in (tmp_path / "no.txt", tmp_path):
        sentence = refused(*inputs.compress(tmp_path / "run", context=place))
        assert sentence.startswith(f"context: {place} cannot be read")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "holds no query"),
        (b"\n\n", "holds no query"),
        (b'{"input": "a"}\nnot json\n', "line 2 is not JSON"),
        (b'{"input": "a"}\n\n{"question": "b"}\n', "line 3"),
        (b'["a"]\n', "line 1"),
        (b'{"input": ""}\n', "line 1"),
        (b'{"input": "a", "output": 3}\n', "line 1"),
        (b'{"input": "\xff"}\n', "UTF-8"),
    ],
)
def test_queries_that_cannot_be_used_are_named_by_line(refused, inputs, tmp_path, content, fragment):
    sentence = refused(*inputs.compress(tmp_path / "run", queries=written(tmp_path, content)))
    assert sentence.startswith("queries: ") and fragment in sentence and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"tokens": 0}, "tokens: got 0, accepted is a whole number ≥ 1"),
        ({"tokens": 300}, "tokens: got 300 for a context of"),
        ({"model": None}, "model: missing"),
        ({"learning_rate": -1}, "learning_rate: got -1.0, accepted is a number > 0"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"device": "cuda:99"}, "device"),
        ({"init": "text"}, "init_text: missing"),
        ({"init": "text", "init_text": "/no/such/file"}, "init_text: /no/such/file cannot be read"),
    ],
)
def test_options_that_cannot_be_served(refused, inputs, tmp_path, changes, fragment):
    assert fragment in refused(*inputs.compress(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "value"), [("--steps", "many"), ("--kind", "lora"), ("--stepz", "3")])
def test_options_that_are_none_are_refused_by_the_parser(run, inputs, tmp_path, option, value):
    result = run(*inputs.compress(tmp_path / "run"), option, value)
    assert result.exit_code == 2 and option in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("- a\n- b\n", "accepted is a mapping"),
        ("learning_rat: 0.1\n", "learning_rat: unknown, did you mean learning_rate?"),
        ("steps: [1, 2]\n", "steps: got [1, 2], accepted is a whole number"),
        ("steps: 3\n  tokens: 4\n", "is not YAML in line 2"),
    ],
)
def test_a_configuration_file_that_cannot_be_used(refused, tmp_path, text, fragment):
    path = written(tmp_path, text.encode())
    sentence = refused("compress", "--config", path)
    assert sentence.startswith(str(path)) and fragment in sentence


def test_a_folder_without_a_model_and_weights_that_are_cut_off(refused, inputs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(*inputs.compress(tmp_path / "run", model=empty))
    broken = tmp_path / "broken"
    shutil.copytree(inputs.model, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert "invalid header" in refused(*inputs.compress(tmp_path / "run", model=broken))


def test_a_hub_name_without_a_network(refused, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'nobody/no-such-model'" in refused(*inputs.compress(tmp_path / "run", model="nobody/no-such-model"))


def test_a_model_whose_attention_cannot_be_served(refused, inputs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(inputs.model, other)
    config = GPTJConfig(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(other)
    assert "gptj" in refused(*inputs.compress(tmp_path / "run", model=other)).lower()


def test_a_tokenizer_that_does_not_fit_the_model(refused, inputs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(inputs.model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    token = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**token, "id": 400 + i, "content": f"<|more{i}|>"} for i in range(80)]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer: got one of" in refused(*inputs.compress(tmp_path / "run", model=other))


def test_an_output_folder_that_holds_something_else(refused, inputs, tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    assert "holds something that is no run" in refused(*inputs.compress(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    assert "is a file" in refused(*inputs.compress(tmp_path / "letter.txt"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "another model"])
def test_a_prompt_that_cannot_be_used(refused, inputs, finished, tmp_path, damage):
    prompt = tmp_path / "prompt"
    shutil.copytree(finished.folder / "prompt", prompt)
    weights, record = prompt / "adapter_model.safetensors", prompt / "softprompt.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "missing":
        weights.unlink()
    else:
        told = json.loads(record.read_text())
        told["model"]["layers"] = 7
        record.write_text(json.dumps(told))
    sentence = refused("generate", "--model", inputs.model, "--prompt", prompt, "Who?")
    assert str(prompt) in sentence
    assert {"truncated": "truncated", "missing": "has no", "another model": "another model"}[damage] in sentence


def test_a_full_disk_says_so_and_leaves_a_run_that_goes_on(run, refused, inputs, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x.png")

    with monkeypatch.context() as patch:
        patch.setattr("softprompt_kernels.compress.run.save_curves", full)
        sentence = refused(*inputs.compress(tmp_path / "run"))
    assert sentence.startswith("the disk is full, writing x.png")
    assert run(*inputs.compress(tmp_path / "run")).exit_code == 0


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (MemoryError(), "memory ran out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), "memory ran out"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (SoftPromptError("one\nsentence"), "one sentence"),
        (OSError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_what_the_machine_refuses_is_a_sentence_too(refused, inputs, tmp_path, monkeypatch, error, fragment):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("softprompt_kernels.compress.compress", fail)
    assert fragment in refused(*inputs.compress(tmp_path / "run"))


def test_debug_shows_where_and_a_defect_is_never_hidden(run, inputs, tmp_path, monkeypatch):
    hidden = run("compress", "--tokens", 0)
    shown = run("compress", "--tokens", 0, "--debug")
    assert hidden.exit_code == 2 and isinstance(shown.exception, SoftPromptError)

    def defect(*_: object, **__: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("softprompt_kernels.compress.compress", defect)
    assert isinstance(run(*inputs.compress(tmp_path / "run")).exception, KeyError)


def test_a_backend_that_does_not_exist(refused, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_BACKEND", "abacus")
    sentence = refused(*inputs.compress(tmp_path / "run"))
    assert sentence.startswith("SOFTPROMPT_BACKEND: ") and "abacus" in sentence
