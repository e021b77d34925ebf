"""The results: one JSON file for each text and method, `results/TEXT/METHOD.json`, with a list of measured cells.

A file is written again, atomically, after each cell, so an interrupted study loses the cell that was running.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.errors import SoftPromptError

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]
_KEY = ("ratio", "seed")
_NEEDED = {"text", "method", "ratio", "seed", "digest", "heldout", "seconds"}


@dataclass(frozen=True)
class Results:
    """The measured cells below a folder."""

    folder: Path = RESULTS

    def path(self, text: str, method: str) -> Path:
        """The file of a text and a method."""
        return self.folder / text / f"{method}.json"

    def cells(self, text: str, method: str) -> list[Record]:
        """The measured cells of a text and a method, by ratio and seed.

        Raises:
            SoftPromptError: the file is damaged. It is never overwritten then.
        """
        path = self.path(text, method)
        if not path.exists():
            return []
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(records, list) or not all(set(record) >= _NEEDED for record in records):
                raise ValueError("it holds something other than a list of cells")
        except (OSError, ValueError, TypeError) as error:
            raise SoftPromptError(f"{path} cannot be read ({error}); restore it with git, or delete it") from error
        return records

    def find(self, text: str, method: str, ratio: int, seed: int) -> Record | None:
        """A measured cell; None if there is none."""
        return next((r for r in self.cells(text, method) if (r["ratio"], r["seed"]) == (ratio, seed)), None)

    def put(self, record: Record) -> None:
        """Add a cell, or replace the one of the same ratio and seed."""
        text, method = record["text"], record["method"]
        key = tuple(record[name] for name in _KEY)
        kept = [other for other in self.cells(text, method) if tuple(other[name] for name in _KEY) != key]
        records = sorted([*kept, record], key=lambda r: tuple(r[name] for name in _KEY))
        path = self.path(text, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(records, indent=1) + "\n")

    def all(self) -> Iterator[Record]:
        """Every measured cell."""
        for path in sorted(self.folder.glob("*/*.json")):
            yield from self.cells(path.parent.name, path.stem)
