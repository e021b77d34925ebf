"""What a run refuses: folders of other runs, and bad input, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Llama4TextConfig

from softprompt_kernels.compress import CompressConfig, compress, plan
from softprompt_kernels.compress.inputs import check_window, load_inputs
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")


def test_the_window_of_a_run_is_what_the_family_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 is served up to the end of its first attention chunk."""
    config = Llama4TextConfig(attention_chunk_size=64, attn_temperature_tuning=False, num_hidden_layers=1)
    model: Any = SimpleNamespace(config=config)
    monkeypatch.setattr("softprompt_kernels.compress.inputs.check_ids", lambda *_: None)
    chat: Any = SimpleNamespace(tokenizer=None, query_ids=lambda text, answered: [1] * len(text))
    check_window(model, chat, 50, [Query("ten")], 11)
    with pytest.raises(SoftPromptError, match="'tens' needs 65 tokens with context and output, accepted are 64"):
        check_window(model, chat, 50, [Query("tens")], 11)
    with pytest.raises(SoftPromptError, match="context: got 64 tokens for a model with a window of 64"):
        check_window(model, chat, 64, [], 1)


# Folders that do not belong to this run


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": 9}, "tokens"),
        ({"learning_rate": 0.5, "seed": 3}, "learning_rate, seed"),
        ({"kind": "embedding"}, "init, kind, learning_rate"),
        ({"steps": 6}, "steps"),
        ({"matching_rows": 70}, "matching_rows"),
        ({"matching_steps": 11}, "matching_steps"),
    ],
)
def test_another_run_in_the_folder_is_refused_with_the_options_that_differ(
    make_config: Make, options: dict[str, Any], named: str
) -> None:
    compress(make_config(steps=1))
    files = {path: path.read_bytes() for path in make_config().output.rglob("*") if path.is_file()}
    with pytest.raises(SoftPromptError, match=f"holds another run, which differs in {named}; choose another folder"):
        compress(make_config(**{"steps": 1} | options))
    assert {path: path.read_bytes() for path in make_config().output.rglob("*") if path.is_file()} == files


def test_a_changed_text_or_query_file_is_another_run(make_config: Make, tmp_path: Path) -> None:
    config = make_config(steps=1)
    compress(config)
    for name, key in (("context.txt", "context"), ("queries.jsonl", "queries")):
        path = tmp_path / name
        before = path.read_text()
        path.write_text(before.replace("sacks", "carts"))
        with pytest.raises(SoftPromptError, match=f"differs in {key};"):
            compress(config)
        path.write_text(before)


def test_a_folder_with_other_files_is_refused_and_not_changed(make_config: Make) -> None:
    config = make_config()
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("mine")
    with pytest.raises(SoftPromptError, match="holds files that do not belong to a run"):
        compress(config)
    assert [entry.name for entry in config.output.iterdir()] == ["thesis.tex"]
    file = make_config(output=config.output / "thesis.tex")
    with pytest.raises(SoftPromptError, match="is a file, accepted is a folder"):
        compress(file)


def test_a_damaged_run_json_is_refused(make_config: Make) -> None:
    config = make_config(steps=1)
    config.output.mkdir()
    for content in ("", "[]", '{"identity": 3}', "{"):
        (config.output / "run.json").write_text(content)
        with pytest.raises(SoftPromptError, match=r"run\.json cannot be read"):
            compress(config)
    (config.output / "run.json").write_text('{"identity": {"seed": 0, "model": 3}}')
    with pytest.raises(SoftPromptError, match=r"differs in .*model, .*tokenizer"):
        compress(config)


# Bad input: refused before anything is written


@pytest.mark.parametrize(
    ("options", "files", "reason"),
    [
        ({}, {"context.txt": ""}, r"context\.txt is empty"),
        ({}, {"context.txt": " \n\t"}, r"context\.txt is empty"),
        ({}, {"context.txt": b"\xffab"}, r"context\.txt is not UTF-8 text \(byte 0\)"),
        ({}, {"context.txt": b"\xff\xfea\x00"}, r"context\.txt is UTF-16 text"),
        ({}, {"context.txt": None}, r"context\.txt cannot be read"),
        ({}, {"context.txt": "word " * 200}, r"context: got \d+ tokens for a model with a window of 512"),
        ({"new_tokens": 500}, {}, r"queries: 'W.*' needs \d+ tokens with context and output, accepted are 512"),
        ({"tokens": 100_000}, {}, r"tokens: got 100000 for a context of (\d+) tokens, accepted is 1 to \d+"),
        ({}, {"queries.jsonl": ""}, "holds no query"),
        ({}, {"queries.jsonl": '{"input": "a"}\n{"inptu": "b"}'}, "line 2"),
        ({}, {"queries.jsonl": '{"input": "a"}'}, "got 1 different input"),
        ({"heldout": "queries.jsonl"}, {}, "none is left to train on"),
        ({"heldout": "missing.jsonl"}, {}, "cannot be read"),
        ({"test": "missing.jsonl"}, {}, r"missing\.jsonl cannot be read"),
        ({"test": "test.jsonl"}, {"test.jsonl": "\n"}, r"test\.jsonl holds no query"),
        ({"test": "queries.jsonl"}, {}, "got 0 different input"),
        (
            {"test": "test.jsonl", "heldout": "heldout.jsonl"},
            {"test.jsonl": '{"input": "a"}\n{"input": "b"}', "heldout.jsonl": '{"input": " b "}'},
            r"test: .*test\.jsonl has 'b', which is held out too; accepted are queries that are not in .*heldout",
        ),
        ({"test": "test.jsonl"}, {"test.jsonl": '{"input": "' + "word " * 100 + '"}'}, "queries: 'word .* needs"),
        ({"model": "/nowhere/at/all"}, {}, "model: cannot load '/nowhere/at/all'"),
        ({"device": "nonsense"}, {}, "device: got 'nonsense'"),
        ({"init": "text", "init_text": "start.txt"}, {"start.txt": " "}, "init_text: .* is empty"),
        ({"nll_weight": 0.5, "loss_temperature": 2.0}, {}, "loss_temperature: got 2.0"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(
    make_config: Make, tmp_path: Path, options: dict[str, Any], files: dict[str, Any], reason: str
) -> None:
    named = {name: tmp_path / value for name, value in options.items() if name in ("heldout", "test", "init_text")}
    config = make_config(**options | named)
    for name, content in files.items():  # make_config has written its own
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SoftPromptError, match=reason):
        compress(config)
    assert not config.output.exists()


def test_the_longest_prompt_has_one_token_less_than_the_context(make_config: Make) -> None:
    tokens = compress(make_config(steps=1))["context_tokens"]
    with pytest.raises(SoftPromptError, match=f"accepted is 1 to {tokens - 1}"):
        compress(make_config(tokens=tokens))
    figures = compress(make_config(tokens=tokens - 1, steps=1, output=make_config().output.with_name("longest")))
    assert figures["prompt_tokens"] == tokens - 1


def test_a_context_that_does_not_matter_is_refused_before_training(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_kernels.compress.evaluate.distance.NEGLIGIBLE_KL", 1e9)
    config = make_config()
    with pytest.raises(SoftPromptError, match="context does not matter for these queries"):
        compress(config)
    assert not (config.output / "metrics.jsonl").exists()
    assert not (config.output / "prompt").exists()


def test_an_initialisation_that_the_model_cannot_have_is_refused_before_the_teacher_answers(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise SoftPromptError("cannot be moved")

    monkeypatch.setattr("softprompt_kernels.compress.teacher.context.shift_keys", refuse)
    monkeypatch.setattr("softprompt_kernels.compress.teaching.answer", None)
    with pytest.raises(SoftPromptError, match="cannot be moved"):
        compress(make_config(init="strided"))


def test_a_context_beyond_the_original_window_of_a_yarn_model_is_accepted(
    tiny_model_folder: Path, tmp_path: Path, make_config: Make
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100, "rope_parameters": rope}))
    inputs = load_inputs(make_config(model=str(folder)))
    assert 100 < inputs.context_tokens < 400
    longer = make_config(model=str(folder))
    longer.context.write_text("word " * 100)
    with pytest.raises(SoftPromptError, match=r"context: got \d+ tokens for a model with a window of 400"):
        load_inputs(longer)


class Stop(Exception):
    """Stops a run at its first message."""


@pytest.mark.parametrize("command", [compress, plan])
def test_a_run_says_that_few_queries_are_about_the_text(
    make_config: Make, recording_reporter: Any, command: Any
) -> None:
    class Stopping(recording_reporter):
        def message(self, text: str) -> None:
            raise Stop(text)

    with pytest.raises(Stop, match=r"selfstudy: \d+ of the 5000 queries asked for are about the text"):
        command(make_config(selfstudy=5000), Stopping())
