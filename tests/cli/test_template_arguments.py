"""Arguments of the chat template on the command line reach the template; others are refused in one sentence."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from softprompt_kernels.cli.options import as_loaded

TEMPLATE = (
    "{% if tone is defined %}{{ tone }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def argued(inputs, tmp_path: Path) -> Path:
    """The model with a template that prints an argument."""
    folder = tmp_path / "argued"
    shutil.copytree(inputs.model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_run_and_its_commands_take_arguments(run, inputs, argued, tmp_path):
    arguments, folder = '{"tone": "it\'s kind"}', tmp_path / "run"
    result = run(*inputs.compress(folder, model=argued, template_arguments=arguments))
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "chat.json").read_text())["arguments"] == {"tone": "it's kind"}
    assert "tone: it's kind" in (folder / "config.yaml").read_text()
    shown = next(line for line in result.stdout.replace("\n", " ").split("try it")[1:])
    words = shlex.split(shown)
    assert words[words.index("--template-arguments") + 1] == arguments

    options, given = ["--model", argued, "--prompt", folder / "prompt"], ["--template-arguments"]
    files = ["--context", inputs.context, "--queries", inputs.heldout, "--new-tokens", 3, "--sample-temperature", 0]
    for command, rest in (("evaluate", files), ("generate", ["--max-new-tokens", 12, "Who?"])):
        results = [run(command, *options, *rest, *more) for more in ([], [*given, arguments], [*given, "{}"])]
        assert [result.exit_code for result in results] == [0, 0, 0], results[0].output
        recorded, same, without = (result.stdout for result in results)
        assert recorded == same, "the arguments of the run are the default"
        assert command == "generate" or without != same


def test_an_argument_changes_an_answer(run, inputs, argued):
    options = ["--model", argued, "--context", inputs.context, "--max-new-tokens", 12, "Who?"]
    plain = run("generate", *options)
    answers = {plain.stdout}
    for number in range(4):  # a tiny model may answer the same in spite of another prompt
        result = run("generate", *options, "--template-arguments", json.dumps({"tone": f"{number} " * 40}))
        assert result.exit_code == 0, result.output
        answers.add(result.stdout)
    assert len(answers) > 1


def test_a_run_with_other_arguments_is_another_run(run, inputs, argued, tmp_path):
    for arguments, code in (("tone: kind", 0), ("tone: rough", 2)):
        result = run(*inputs.compress(tmp_path / "run", model=argued, template_arguments=arguments, steps=0))
        assert result.exit_code == code, result.output
    assert "which differs in template_arguments" in result.stderr


@pytest.mark.parametrize("command", ["compress", "generate", "evaluate"])
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ("tone", "accepted is a mapping of names to JSON values"),
        ("{", "accepted is a mapping of names to JSON values"),
        ('{"tone": 1, "tone": 2}', "accepted is a mapping of names to JSON values"),
        ('{"tones": 1}', "accepted are variables that the chat template uses"),
        ('{"tokenize": true}', "accepted are other variables that the chat template uses"),
    ],
)
def test_other_arguments_are_refused(run, inputs, argued, finished, tmp_path, command, arguments, fragment):
    files = ["--context", inputs.context, "--prompt", finished.folder / "prompt", "--queries", inputs.heldout]
    words = {
        "compress": inputs.compress(tmp_path / "run", model=argued, template_arguments=arguments),
        "generate": ["generate", "--model", argued, "Who?", "--template-arguments", arguments],
        "evaluate": ["evaluate", "--model", argued, *files, "--template-arguments", arguments],
    }[command]
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("Error:") == 1 and fragment in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_question_after_a_mark_is_read_without_it(run, inputs):
    plain = run("generate", "--model", inputs.model, "--max-new-tokens", 4, stdin=b"Who?\n")
    marked = run("generate", "--model", inputs.model, "--max-new-tokens", 4, stdin=b"\xef\xbb\xbfWho?\n")
    assert plain.exit_code == 0 and marked.stdout == plain.stdout


def test_a_dry_run_takes_the_arguments_that_it_is_given(run, inputs, argued, tmp_path):
    options = {"model": argued, "steps": 0}
    result = run(*inputs.compress(tmp_path / "run", template_arguments="tone: kind", **options))
    assert result.exit_code == 0, result.output
    counts = []
    for arguments in ("tone: kind", "tone: kind and kind and kind", None):
        result = run(*inputs.compress(tmp_path / "run", template_arguments=arguments, **options), "--dry-run")
        assert result.exit_code == 0, result.output
        counts.append(re.search(r"context +(\d+) tokens", result.stdout)[1])
    assert len(set(counts)) == 3


def test_a_later_command_loads_the_same_model() -> None:
    assert as_loaded("my-model", "auto") == "--model my-model"
    shown = as_loaded("my-model", "4bit", {"enable_thinking": False})
    assert shown == "--model my-model --dtype 4bit --template-arguments '{\"enable_thinking\": false}'"
