"""The texts of the study, each with held-out and test questions.

    demo      demo/handbook.txt, with the demo's own questions for training
    license   LICENSE of this repository
    others    each benchmarks/study/texts/*.txt

`NAME.heldout.jsonl` and `NAME.test.jsonl` in benchmarks/study/texts hold the questions of all texts but the demo's.
Their training queries are made from the text (self-study).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError

ROOT = Path(__file__).parents[2]
TEXTS = Path(__file__).parent / "texts"


@dataclass(frozen=True)
class Text:
    """One text.

    Args:
        name: as on the command line.
        context: file of the text.
        heldout, test: files of questions. A text may have no test file; then only the held-out figures are measured.
        queries: file of training queries, beside those of self-study; None for none.
        selfstudy: number of training queries made from the text.
        samples: answers to each training query.
        short: True for a text of several hundred tokens, False for one of several thousand.
    """

    name: str
    context: Path
    heldout: Path
    test: Path
    queries: Path | None = None
    selfstudy: int = 200
    samples: int = 1
    short: bool = False

    def missing(self) -> str | None:
        """Why the text cannot be measured; None if it can."""
        files = (self.context, self.heldout, *(() if self.queries is None else (self.queries,)))
        absent = [str(file) for file in files if not file.is_file()]
        return f"{self.name}: {', '.join(absent)} is missing" if absent else None


def all_texts() -> dict[str, Text]:
    """Every text by name, also those that miss a file."""
    demo = ROOT / "demo"
    found = {
        "demo": Text(
            "demo",
            demo / "handbook.txt",
            demo / "heldout.jsonl",
            demo / "test.jsonl",
            demo / "queries.jsonl",
            selfstudy=40,
            samples=2,
            short=True,
        ),
        "license": _with_questions("license", ROOT / "LICENSE"),
    }
    for file in sorted(TEXTS.glob("*.txt")):
        found.setdefault(file.stem, _with_questions(file.stem, file))
    return found


def chosen_texts(names: Iterable[str]) -> list[Text]:
    """The texts of these names.

    Raises:
        SoftPromptError: a name is unknown, or a text misses a file.
    """
    known, chosen = all_texts(), []
    for name in names:
        if name not in known:
            raise SoftPromptError(f"text: got {name!r}, accepted are {', '.join(known)}")
        if reason := known[name].missing():
            raise SoftPromptError(f"text: {reason}")
        chosen.append(known[name])
    return chosen


def _with_questions(name: str, context: Path) -> Text:
    return Text(name, context, TEXTS / f"{name}.heldout.jsonl", TEXTS / f"{name}.test.jsonl")
