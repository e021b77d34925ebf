"""`compress`, `generate` and `evaluate` on folders as people have them, from the text to the answer.

A multimodal wrapper is in doctor/test_model.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Models tuned for chat often answer as somebody whom the template names where no system turn is given.
WITH_A_DEFAULT_SYSTEM_TURN = """{%- if messages[0].role != "system" -%}
<|im_start|>system
You are a helpful assistant named Tiny.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture
def chat_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A chat model whose template brings a system turn, and whose turns end with another token than its texts."""
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text(WITH_A_DEFAULT_SYSTEM_TURN)
    settings = {"eos_token_id": [257, 65], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def base_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A base model: no chat template, no token for padding."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings = {key: value for key, value in settings.items() if not key.startswith(("pad_token", "chat_template"))}
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["chat_folder", "base_folder"])
def test_from_the_text_to_an_answer(
    kind: str, run: Callable[..., Any], inputs: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    output = tmp_path / "run"
    result = run(*inputs.compress(output, model=folder))
    assert result.exit_code == 0, result.output
    heldout = json.loads((output / "evaluation.json").read_text())["heldout"]
    assert heldout["kl_none"] > 0.01 and heldout["kl_prompt"] < heldout["kl_none"]
    answer = ["--model", folder, "--prompt", output / "prompt"]
    result = run("generate", *answer, "--max-new-tokens", 4, "Who owns it?")
    assert result.exit_code == 0, result.output
    files = ["--context", inputs.context, "--queries", inputs.heldout, "--new-tokens", 4]
    result = run("evaluate", *answer, *files)
    assert result.exit_code == 0 and "soft prompt" in result.stdout, result.output


def test_without_a_context_the_default_system_turn_is_read(chat_folder: Path) -> None:
    from softprompt_kernels.compress import ChatFormat, load_model

    _, tokenizer = load_model(str(chat_folder), "auto", "cpu")
    chat = ChatFormat(tokenizer)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True
    )
    before = chat.no_context_ids()
    assert before is not None
    assert tokenizer.decode([*before[0].tolist(), *chat.query_ids("Who?")]) == rendered
    assert "named Tiny" in tokenizer.decode(before[0]) and "named Tiny" not in tokenizer.decode(
        chat.context_ids("A.")[0]
    )
