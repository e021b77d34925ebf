"""What a suite is: one context, questions about it with references, and how answers are judged.

A prompt is made for one context, so a suite has one. Its questions are of two kinds, which have nothing in common:

    train   may be asked while the prompt is made; of other facts than the tested ones
    test    are asked once, at the end

`write_suite` puts both into files that `softprompt compress` and `softprompt evaluate` read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from softprompt_kernels.compress.sources.queries import Query, write_text
from softprompt_kernels.errors import SoftPromptError

MADE = ("needle", "multikey", "multivalue", "variables", "pairs")
"""Suites that are made from a seed."""

READ = ("longhealth", "qasper", "mtob")
"""Suites that are read from the files of a benchmark, which the user has."""


@dataclass(frozen=True)
class Suite:
    """A context and questions about it.

    Args:
        name: one of `MADE` or `READ`.
        metric: of accuracy, a key of `METRICS` in evaluate/accuracy.py or "chrf".
        context: the text.
        train: questions that may be asked in training; empty for the files of benchmarks.
        test: questions with references. None of them is in `train`.
        subjects: for each test question the words that name the fact it asks for, to find what training has touched;
            empty where a question is not about one fact.
        origin: what it was made or read from, for the record: seed, length in tokens, file and so on.
    """

    name: str
    metric: str
    context: str
    train: tuple[Query, ...]
    test: tuple[Query, ...]
    subjects: tuple[tuple[str, ...], ...] = ()
    origin: tuple[tuple[str, int | str], ...] = ()


@dataclass(frozen=True)
class SuiteFiles:
    """Paths of the files of a suite.

    Args:
        folder: that they are in.
    """

    folder: Path

    @property
    def context(self) -> Path:
        """The text."""
        return self.folder / "context.txt"

    @property
    def train(self) -> Path:
        """The training questions, which a suite may lack."""
        return self.folder / "train.jsonl"

    @property
    def test(self) -> Path:
        """The test questions."""
        return self.folder / "test.jsonl"

    @property
    def record(self) -> Path:
        """Name, metric and origin."""
        return self.folder / "suite.json"

    @property
    def run(self) -> Path:
        """The folder of the compression."""
        return self.folder / "run"

    @property
    def figures(self) -> Path:
        """The figures of the evaluation."""
        return self.folder / "figures.json"


def check_suite_name(name: str) -> None:
    """Raise SoftPromptError unless `name` is that of a suite."""
    if name not in (*MADE, *READ):
        raise SoftPromptError(f"suite: got {name!r}, accepted are {', '.join((*MADE, *READ))}")


def write_suite(suite: Suite, folder: Path) -> SuiteFiles:
    """Write the context, the questions and a record of a suite. The same suite may be written again.

    Args:
        suite: the suite.
        folder: made if it does not exist.

    Raises:
        SoftPromptError: the folder holds another suite or other files, or cannot be written.
    """
    files = SuiteFiles(folder)
    contents = {
        files.context: suite.context,
        **({files.train: _lines(suite.train)} if suite.train else {}),
        files.test: _lines(suite.test),
        files.record: json.dumps({"name": suite.name, "metric": suite.metric, **dict(suite.origin)}, indent=1) + "\n",
    }
    known = {*contents, files.train, files.run, files.figures}
    try:
        if folder.is_dir():
            if other := next((path for path in sorted(folder.iterdir()) if path not in known), None):
                raise SoftPromptError(
                    f"output: {folder} holds {other.name}, which is of no suite; choose another folder"
                )
            for path, text in contents.items():
                if path.exists() and path.read_bytes() != text.encode():
                    raise SoftPromptError(
                        f"output: {folder} holds another suite, which differs in {path.name}; choose another folder"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in contents.items():
            write_text(path, text)
    except OSError as error:
        raise SoftPromptError(f"output: {folder} cannot be written ({error.strerror or error})") from error
    return files


def _lines(queries: Sequence[Query]) -> str:
    records = ({name: value for name, value in asdict(query).items() if value} for query in queries)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
