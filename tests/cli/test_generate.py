"""`softprompt generate`: each way of asking gives what the models layer gives."""

import pytest
import torch

from softprompt_kernels.compress import ChatFormat, load_model
from softprompt_kernels.models import capture, generate, prefix_of
from softprompt_kernels.prompts import load

QUESTION = "Who owns it?"


@pytest.fixture(scope="module")
def answers(inputs, finished) -> dict[str, str]:
    """The greedy answer of 8 tokens behind the full text, the soft prompt, and nothing."""
    model, tokenizer = load_model(str(inputs.model))
    chat = ChatFormat(tokenizer)
    ids = torch.tensor([chat.query_ids(QUESTION)])
    prefixes = {
        "full text": capture(model, chat.context_ids(inputs.context.read_text())),
        "soft prompt": prefix_of(model, load(finished.folder / "prompt", model, tokenizer)[0]),
        "nothing": None,
    }
    found = {}
    for name, prefix in prefixes.items():
        tokens = generate(model, ids, prefix, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        found[name] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert len(set(found.values())) == 3
    return found


def shown(text: str) -> list[str]:
    """Lines without blanks at their ends: the random model writes control characters too."""
    return [line.strip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("before", ["soft prompt", "full text", "nothing"])
def test_the_answer_is_streamed_to_standard_output(run, inputs, finished, answers, before):
    options = {
        "soft prompt": ["--prompt", finished.folder / "prompt"],
        "full text": ["--context", inputs.context],
        "nothing": [],
    }[before]
    result = run("generate", "--model", inputs.model, *options, "--max-new-tokens", 8, QUESTION)
    assert result.exit_code == 0, result.output
    assert shown(result.stdout) == shown(answers[before])


def test_several_questions_are_told_apart(run, inputs):
    result = run("generate", "--model", inputs.model, "--max-new-tokens", 4, "Who?", "Where?")
    assert result.exit_code == 0, result.output
    assert "> Who?\n" in result.stdout and "> Where?\n" in result.stdout


def test_questions_come_from_standard_input_a_line_each(run, inputs, answers):
    result = run("generate", "--model", inputs.model, "--max-new-tokens", 8, stdin=f"{QUESTION}\n\n{QUESTION}\n")
    assert result.exit_code == 0, result.output
    assert shown(result.stdout) == shown(answers["nothing"]) * 2


def test_compare_puts_the_three_answers_under_the_question(run, inputs, finished, answers):
    options = ["--prompt", finished.folder / "prompt", "--context", inputs.context, "--compare", "--max-new-tokens", 8]
    result = run("generate", "--model", inputs.model, *options, QUESTION)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"> {QUESTION}"
    heads = [line.split("|")[0].strip() for line in lines[1:] if "|" in line]
    assert [head for head in heads if head] == ["full text", "soft prompt", "nothing"]
    for name, text in answers.items():
        (line,) = [line for line in lines if line.strip().startswith(f"{name} ")]
        assert line.partition("| ")[2].strip() == text.splitlines()[0].strip()


def test_a_seed_gives_the_same_sample_and_another_one_another(run, inputs):
    command = ["generate", "--model", inputs.model, "--max-new-tokens", 12, "--temperature", 1.0, QUESTION, "--seed"]
    first, second, third = (run(*command, seed).stdout for seed in (1, 1, 2))
    assert first == second != third


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--prompt", "{prompt}", "--context", "{context}", "Who?"], "--compare with both"),
        (["--compare", "--prompt", "{prompt}", "Who?"], "--compare: needs both"),
        (["--prompt", "{folder}", "Who?"], "is not a saved prompt"),
        (["--context", "{folder}", "Who?"], "context:"),
        (["  "], "questions: got an empty one"),
        ([], "questions: got none"),
        (["Who?", "--max-new-tokens", "5000"], "5000"),
        (["--device", "warp", "Who?"], "device: got 'warp'"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_sentence(run, inputs, finished, tmp_path, arguments, fragment):
    places = {"prompt": finished.folder / "prompt", "context": inputs.context, "folder": tmp_path}
    result = run("generate", "--model", inputs.model, *(text.format(**places) for text in arguments), stdin="")
    assert result.exit_code == 2, result.output
    assert result.stderr.count("Error:") == 1 and fragment in result.stderr
    assert "Traceback" not in result.output


def test_questions_that_are_no_text_are_refused(run, inputs):
    result = run("generate", "--model", inputs.model, stdin=b"\xff\xfe\n")
    assert result.exit_code == 2 and "standard input is not UTF-8" in result.stderr
