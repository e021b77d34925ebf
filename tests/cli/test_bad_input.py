"""Bad input ends with one message on standard error and exit code 2, and leaves nothing half done."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GPTJConfig, GPTJForCausalLM

from softprompt_kernels.errors import SoftPromptError


@pytest.fixture
def refused(run):
    """`refused(*arguments)` checks exit code and output of a command that must fail, and returns its message."""

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
def test_an_unusable_context(refused, inputs, tmp_path, content, fragment):
    tokens = 500 if content == b"a" else 12
    message = refused(*inputs.compress(tmp_path / "run", context=written(tmp_path, content), tokens=tokens))
    assert fragment in message and not (tmp_path / "run").exists()


def test_a_context_that_is_missing_or_an_empty_folder(refused, inputs, tmp_path):
    for place, why in ((tmp_path / "no.txt", "cannot be read"), (tmp_path, "holds no context that can be used")):
        message = refused(*inputs.compress(tmp_path / "run", context=place))
        assert message.startswith(f"context: {place} {why}")


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
def test_invalid_queries_are_named_by_line(refused, inputs, tmp_path, content, fragment):
    message = refused(*inputs.compress(tmp_path / "run", queries=written(tmp_path, content)))
    assert message.startswith("queries: ") and fragment in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"tokens": 0}, "tokens: got 0, accepted is an integer ≥ 1"),
        ({"tokens": 300}, "tokens: got 300 for a context of"),
        ({"model": None}, "model: missing"),
        ({"learning_rate": -1}, "learning_rate: got -1.0, accepted is a number > 0"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"device": "cuda:99"}, "device"),
        ({"init": "text"}, "init_text: missing"),
        ({"init": "text", "init_text": "/no/such/file"}, "init_text: /no/such/file cannot be read"),
    ],
)
def test_options_of_bad_value(refused, inputs, tmp_path, changes, fragment):
    assert fragment in refused(*inputs.compress(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "value"), [("--steps", "many"), ("--kind", "lora"), ("--stepz", "3")])
def test_unknown_options_and_types_are_refused_by_the_parser(run, inputs, tmp_path, option, value):
    result = run(*inputs.compress(tmp_path / "run"), option, value)
    assert result.exit_code == 2 and option in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("- a\n- b\n", "accepted is a mapping"),
        ("learning_rat: 0.1\n", "learning_rat: unknown, did you mean learning_rate?"),
        ("steps: [1, 2]\n", "steps: got [1, 2], accepted is an integer"),
        ("steps: 3\n  tokens: 4\n", "is not YAML in line 2"),
    ],
)
def test_an_invalid_configuration_file(refused, tmp_path, text, fragment):
    path = written(tmp_path, text.encode())
    message = refused("compress", "--config", path)
    assert message.startswith(str(path)) and fragment in message


def test_a_folder_without_a_model_and_truncated_weights(refused, inputs, tmp_path):
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


def test_a_model_of_an_unsupported_family(refused, inputs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(inputs.model, other)
    config = GPTJConfig(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(other)
    assert "gptj" in refused(*inputs.compress(tmp_path / "run", model=other)).lower()


@pytest.fixture
def more_tokens(inputs, tmp_path):
    """A folder of the model, with 39 tokens of the tokenizer that have no embedding."""
    other = tmp_path / "other"
    shutil.copytree(inputs.model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    token = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [
        {**token, "id": 400 + i, "content": f"<more{i}>", "special": False} for i in range(80)
    ]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return other


def test_tokens_without_an_embedding_matter_only_where_a_text_needs_one(run, refused, inputs, more_tokens, tmp_path):
    for command in (
        inputs.compress(tmp_path / "run", model=more_tokens, steps=1),
        ["generate", "Who?", "--model", more_tokens, "--context", inputs.context, "--max-new-tokens", 2],
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
        (warning,) = [line for line in result.stderr.splitlines() if line.startswith("Warning: tokenizer: ")]
        assert "39 of its tokens ('<more" in warning and "have no embedding" in warning
    (tmp_path / "text").write_text(inputs.context.read_text() + "<more48>")
    (tmp_path / "queries").write_text('{"input": "Who is <more50>?"}\n{"input": "Where?"}\n')
    (tmp_path / "outputs").write_text('{"input": "Which?", "output": "<more44>"}\n')
    new = tmp_path / "new"
    reason = "of id 307, accepted are ids below 300"
    assert reason in refused(*inputs.compress(new, model=more_tokens, context=tmp_path / "text"))
    assert "of id 309" in refused(*inputs.compress(new, model=more_tokens, queries=tmp_path / "queries"))
    assert "of id 303" in refused(*inputs.compress(new, model=more_tokens, heldout=tmp_path / "outputs"))
    text = {"init": "text", "init_text": tmp_path / "text", "tokens": 3}
    assert f"init_text: the tokenizer gives the token '<more48>' {reason}" in refused(
        *inputs.compress(new, model=more_tokens, **text)
    )
    assert not new.exists()
    prompt = ["--prompt", tmp_path / "run" / "prompt", "--model", more_tokens]
    assert "questions: '<more42>'" in refused("generate", "<more42>", *prompt)
    files = ["--context", inputs.context, "--queries", tmp_path / "queries"]
    assert "of id 309" in refused("evaluate", *files, *prompt)


def test_an_output_folder_with_other_files(refused, inputs, tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    assert "holds files that do not belong to a run" in refused(*inputs.compress(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    assert "is a file" in refused(*inputs.compress(tmp_path / "letter.txt"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "another model"])
def test_an_unusable_prompt(refused, inputs, finished, tmp_path, damage):
    prompt = tmp_path / "prompt"
    shutil.copytree(finished.folder / "prompt", prompt)
    weights, record = prompt / "adapter_model.safetensors", prompt / "softprompt.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "missing":
        weights.unlink()
    else:
        content = json.loads(record.read_text())
        content["model"]["layers"] = 7
        record.write_text(json.dumps(content))
    message = refused("generate", "--model", inputs.model, "--prompt", prompt, "Who?")
    assert str(prompt) in message
    assert {"truncated": "truncated", "missing": "has no", "another model": "another model"}[damage] in message


def test_a_prompt_of_another_model_is_used_by_force(run, refused, inputs, finished, tmp_path):
    prompt = tmp_path / "prompt"
    shutil.copytree(finished.folder / "prompt", prompt)
    record = json.loads((prompt / "softprompt.json").read_text())
    record["model"]["weights"] = {"float16": "0" * 64, "bfloat16": "0" * 64}
    (prompt / "softprompt.json").write_text(json.dumps(record))
    files = ["--context", inputs.context, "--queries", inputs.heldout, "--new-tokens", 4]
    for command in (["generate", "Who?", "--max-new-tokens", 2], ["evaluate", *files]):
        command += ["--model", inputs.model, "--prompt", prompt]
        assert "made for another model" in refused(*command)
        forced = run(*command, "--force")
        assert forced.exit_code == 0, forced.output
        assert "Warning: " in forced.stderr and "made for another model" in forced.stderr


def test_a_full_disk_is_named_and_the_run_can_be_resumed(run, refused, inputs, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x.png")

    with monkeypatch.context() as patch:
        patch.setattr("softprompt_kernels.compress.run.save", full)
        message = refused(*inputs.compress(tmp_path / "run"))
    assert message.startswith("the disk is full, writing x.png")
    assert run(*inputs.compress(tmp_path / "run")).exit_code == 0


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), "out of memory"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (SoftPromptError("one\nmessage"), "one message"),
        (
            UnicodeEncodeError("ascii", "é.txt", 0, 1, "ordinal not in range(128)"),
            "'\\xe9.txt' cannot be written in ascii",
        ),
        (OSError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_errors_of_the_machine_have_a_message_too(refused, inputs, tmp_path, monkeypatch, error, fragment):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("softprompt_kernels.compress.compress", fail)
    assert fragment in refused(*inputs.compress(tmp_path / "run"))


def test_debug_shows_the_traceback_and_a_bug_is_never_hidden(run, inputs, tmp_path, monkeypatch):
    without_debug = run("compress", "--tokens", 0)
    with_debug = run("compress", "--tokens", 0, "--debug")
    assert without_debug.exit_code == 2 and isinstance(with_debug.exception, SoftPromptError)

    def bug(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("softprompt_kernels.compress.compress", bug)
    assert isinstance(run(*inputs.compress(tmp_path / "run")).exception, KeyError)


def test_a_backend_that_does_not_exist(refused, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_BACKEND", "abacus")
    message = refused(*inputs.compress(tmp_path / "run"))
    assert message.startswith("SOFTPROMPT_BACKEND: ") and "abacus" in message


def test_a_compressor_is_trained_by_one_process(refused, tmp_path, monkeypatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    options = {"--model": "none", "--contexts": tmp_path, "--output": tmp_path / "run", "--tokens": 4}
    message = refused("train-compressor", *(word for pair in options.items() for word in pair))
    assert message == "torchrun: got 2 processes, accepted by train-compressor is one, without torchrun"
    assert not (tmp_path / "run").exists()
