"""The command line in this process, a text, queries, and a finished run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from softprompt_kernels.cli import app

TEXT = "The red house by the river is number seven.\nIts owner, Ada Brook, keeps nine geese and a cat named Tom.\n"
QUESTIONS = ("Who owns it?", "Where is it?", "How many geese?", "What is the cat called?", "What number?", "Which hue?")

Run = Callable[..., Result]


def _run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def run() -> Run:
    """`run("generate", "--model", ...)` returns exit code, standard output and standard error of `softprompt`."""
    return _run


@dataclass(frozen=True)
class Inputs:
    """The files that the commands read."""

    model: Path
    context: Path
    queries: Path
    heldout: Path

    def compress(self, output: Path, **changes: object) -> list[str]:
        """The arguments of a small compression into `output`. A change to None leaves an option out."""
        options: dict[str, object] = {
            "model": self.model,
            "context": self.context,
            "output": output,
            "tokens": 12,
            "queries": self.queries,
            "heldout": self.heldout,
            "selfstudy": 0,
            "new_tokens": 6,
            "matching_steps": 10,
            "steps": 4,
            "batch_size": 2,
            "evaluate_every": 2,
            **changes,
        }
        given = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None)
        return ["compress", *(word for pair in given for word in pair)]


@pytest.fixture(scope="session")
def inputs(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A model, a text of about 150 tokens, four training queries and two held-out queries."""
    folder = tmp_path_factory.mktemp("inputs")
    files = Inputs(tiny_model_folder, folder / "text.txt", folder / "queries.jsonl", folder / "heldout.jsonl")
    files.context.write_text(TEXT)
    lines = [f'{{"input": "{question}"}}\n' for question in QUESTIONS]
    files.queries.write_text("".join(lines[:4]))
    files.heldout.write_text("".join(lines[4:]))
    return files


@dataclass(frozen=True)
class Finished:
    """A finished compression: its folder and the output of the command."""

    folder: Path
    result: Result


@pytest.fixture(scope="session")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that the tests of other commands use. They must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = _run(*inputs.compress(folder))
    assert result.exit_code == 0, result.output
    return Finished(folder, result)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""
