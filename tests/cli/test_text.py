"""Arguments, input and terminals that are not UTF-8: the text arrives, or one sentence says what is wrong."""

import os
import subprocess
import sys

import pytest

from softprompt_kernels.cli.text import as_text
from softprompt_kernels.errors import SoftPromptError

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
PROGRAM = "from softprompt_kernels.cli import main; main()"


def softprompt(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    words = [argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments]
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, input=stdin, env={**os.environ, **environment}, capture_output=True)


def test_an_argument_is_read_as_utf8_whatever_the_terminal_is():
    question = "Wé, 你好?"
    assert as_text(question, "questions") == question
    assert as_text(question.encode().decode("ascii", "surrogateescape"), "questions") == question
    for wrong in (b"Who \xff?".decode("utf-8", "surrogateescape"), "\ud800"):
        with pytest.raises(SoftPromptError, match=r"questions: got '.*\\ud.*', accepted is UTF-8 text"):
            as_text(wrong, "questions")


def test_a_terminal_of_ascii_shows_an_answer_that_is_not(inputs, tmp_path):
    command = ["generate", "--model", inputs.model, "--context", inputs.context, "--max-new-tokens", 8]
    utf8 = softprompt(*command, "Wé?", PYTHONUTF8="1")
    assert utf8.returncode == 0 and not utf8.stdout.isascii(), "the answer can show what is tested"
    for stdin, questions in ((b"", ["Wé?"]), ("Wé?\n".encode(), [])):
        plain = softprompt(*command, *questions, stdin=stdin, **ASCII)
        assert plain.returncode == 0, plain.stderr
        assert plain.stdout.decode("ascii") == utf8.stdout.decode().encode("ascii", "backslashreplace").decode()


def test_bytes_that_are_not_utf8_are_refused_in_one_sentence(run, inputs):
    result = run("generate", "--model", inputs.model, "Where?", "Who \udcff?")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.stderr == "Error: questions: got 'Who \\udcff?', accepted is UTF-8 text\n"


def test_an_output_of_other_bytes_is_refused_before_any_work(run, inputs, tmp_path):
    output = os.fsencode(tmp_path) + b"/o\xff"
    result = run(*inputs.compress(os.fsdecode(output)))
    assert result.exit_code == 2 and "accepted is a path in UTF-8" in result.stderr
    assert not os.path.exists(output)


def test_a_prompt_in_a_folder_of_other_bytes_has_a_message(run, inputs, finished, tmp_path):
    prompt = os.fsdecode(os.fsencode(tmp_path) + b"/p\xff")
    try:
        os.symlink(finished.folder / "prompt", prompt)
    except OSError:  # macOS has no such names
        return
    result = run("generate", "--model", inputs.model, "--prompt", prompt, "Who?", "--max-new-tokens", 2)
    assert "Traceback" not in result.output
    assert result.exit_code == 2 and "UTF-8" in result.stderr
