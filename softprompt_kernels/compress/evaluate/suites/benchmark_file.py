"""JSON files of benchmarks, with one sentence for a file that is missing, broken or of another format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError


class BenchmarkFile:
    """A JSON file.

    Args:
        path: the file.
        benchmark: its name, for messages.
        expected: what such a file is, for messages.

    Raises:
        SoftPromptError: the file cannot be read or is not JSON.
    """

    def __init__(self, path: Path, benchmark: str, expected: str) -> None:
        self.path, self.benchmark, self.expected = path, benchmark, expected
        text = read_utf8(path, f"file: {path}")
        try:
            self.content: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"it is not JSON ({error})") from error

    def error(self, reason: str) -> SoftPromptError:
        """The error for a file of another format."""
        return SoftPromptError(
            f"file: {self.path} is no file of {self.benchmark}: {reason}; accepted is {self.expected}"
        )

    def mapping(self, value: Any, place: str) -> Mapping[str, Any]:
        """The value, if it is a JSON object and not empty; `place` says where it stands.

        Raises:
            SoftPromptError: it is something else.
        """
        if not isinstance(value, dict) or not value:
            raise self.error(f"{place} is no object with entries")
        return value

    def sequence(self, value: Any, place: str) -> Sequence[Any]:
        """The value, if it is a JSON list and not empty; arguments and errors as in `mapping`."""
        if not isinstance(value, list) or not value:
            raise self.error(f"{place} is no list with entries")
        return value

    def text(self, value: Any, place: str) -> str:
        """The value, if it is a text and not blank; arguments and errors as in `mapping`."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{place} is no text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(f"{place} has half of a surrogate pair")
        return value

    def chosen(self, items: Sequence[str]) -> dict[str, Any]:
        """The entries of the whole file with these keys, or the first one if none are given.

        Raises:
            SoftPromptError: the file is no object, or lacks a key.
        """
        everything = self.mapping(self.content, "the whole file")
        wanted = items or [next(iter(everything))]
        for item in wanted:
            if item not in everything:
                some = ", ".join(list(everything)[:5]) + (", …" if len(everything) > 5 else "")
                raise SoftPromptError(f"item: got {item!r}, accepted in {self.path} are {some}")
        return {item: everything[item] for item in wanted}
