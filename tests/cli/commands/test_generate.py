"""`softprompt generate`: answers equal those of `softprompt_kernels.models.generate` with the same prefix."""

import pytest
import torch

from softprompt_kernels.compress import ChatFormat, load_model
from softprompt_kernels.compress.report.answers import printable
from softprompt_kernels.models import capture, generate, prefix_of
from softprompt_kernels.prompts import load

QUESTION = "Who owns it?"


@pytest.fixture(scope="module")
def answers(inputs, finished) -> dict[str, str]:
    """The greedy answers of 8 tokens with the full context, the soft prompt, and no context."""
    model, tokenizer = load_model(str(inputs.model))
    chat = ChatFormat(tokenizer)
    ids = torch.tensor([chat.query_ids(QUESTION)])
    prefixes = {
        "full context": capture(model, chat.context_ids(inputs.context.read_text())),
        "soft prompt": prefix_of(model, load(finished.folder / "prompt", model, tokenizer)[0]),
        "no context": None,
    }
    found = {}
    for name, prefix in prefixes.items():
        tokens = generate(model, ids, prefix, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        found[name] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert len(set(found.values())) == 3
    return found


def shown(text: str) -> list[str]:
    """The lines without white space at their ends, because the random model also writes control characters."""
    return [line.strip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("before", ["soft prompt", "full context", "no context"])
def test_the_answer_is_streamed_to_standard_output(run, inputs, finished, answers, before):
    options = {
        "soft prompt": ["--prompt", finished.folder / "prompt"],
        "full context": ["--context", inputs.context],
        "no context": [],
    }[before]
    result = run("generate", "--model", inputs.model, *options, "--max-new-tokens", 8, QUESTION)
    assert result.exit_code == 0, result.output
    assert shown(result.stdout) == shown(answers[before])


def test_each_of_several_questions_is_repeated_before_its_answer(run, inputs):
    result = run("generate", "--model", inputs.model, "--max-new-tokens", 4, "Who?", "Where?")
    assert result.exit_code == 0, result.output
    assert "> Who?\n" in result.stdout and "> Where?\n" in result.stdout


def test_questions_come_from_standard_input_a_line_each(run, inputs, answers):
    result = run("generate", "--model", inputs.model, "--max-new-tokens", 8, stdin=f"{QUESTION}\n\n{QUESTION}\n")
    assert result.exit_code == 0, result.output
    assert shown(result.stdout) == shown(answers["no context"]) * 2


def test_compare_puts_the_three_answers_under_the_question(run, inputs, finished, answers):
    options = ["--prompt", finished.folder / "prompt", "--context", inputs.context, "--compare", "--max-new-tokens", 8]
    result = run("generate", "--model", inputs.model, *options, QUESTION)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"> {QUESTION}"
    heads = [line.split("|")[0].strip() for line in lines[1:] if "|" in line]
    assert [head for head in heads if head] == ["full context", "soft prompt", "no context"]
    for name, text in answers.items():
        (line,) = [line for line in lines if line.strip().startswith(f"{name} ")]
        assert line.partition("| ")[2].strip() == printable(text).splitlines()[0].strip()


def test_the_seed_determines_the_sample(run, inputs):
    command = ["generate", "--model", inputs.model, "--max-new-tokens", 12, "--temperature", 1.0, QUESTION, "--seed"]
    first, second, third = (run(*command, seed).stdout for seed in (1, 1, 2))
    assert first == second != third


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--prompt", "{prompt}", "--context", "{context}", "Who?"], "both with --compare"),
        (["--compare", "--prompt", "{prompt}", "Who?"], "--compare: needs both"),
        (["--prompt", "{folder}", "Who?"], "is not a saved prompt"),
        (["--context", "{folder}", "Who?"], "context:"),
        (["  "], "questions: got an empty one"),
        ([], "questions: got none"),
        (["Who?", "--max-new-tokens", "5000"], "5000"),
        (["--device", "warp", "Who?"], "device: got 'warp'"),
    ],
)
def test_bad_arguments_are_refused_with_one_message(run, inputs, finished, tmp_path, arguments, fragment):
    places = {"prompt": finished.folder / "prompt", "context": inputs.context, "folder": tmp_path}
    result = run("generate", "--model", inputs.model, *(text.format(**places) for text in arguments), stdin="")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("Error:") == 1 and fragment in result.stderr
    assert "Traceback" not in result.output


def test_questions_that_are_not_utf8_are_refused(run, inputs):
    result = run("generate", "--model", inputs.model, stdin=b"\xff\xfe\n")
    assert result.exit_code == 2 and "standard input is not UTF-8" in result.stderr
