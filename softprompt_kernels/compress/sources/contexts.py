"""Many contexts: a folder of text files, or a file of JSON Lines with a context in each line.

    {"name": "...", "text": "...", "queries": [{"input": "...", "output": "..."}, ...], "heldout": [...], "test": [...]}

Only the text is needed; it may be called "context" too. The three lists hold what a line of a file of queries holds
(see `queries.py`). In a folder, every file is a context, also those of folders in it. Hidden files are ignored.

Each context has a name that is its own and that a file may have. It does not change when others are added behind: a
file is called as its path in the folder, without ".txt", and a line without a name by its number. A context that is
broken is named with the reason, and the others are still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from softprompt_kernels.compress.sources.queries import Query, query_of
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError

_EMPTY = ", accepted are text files in a folder, or a line for each in a .jsonl file"
_KEYS = ("name", "text", "context", "queries", "heldout", "test")
_NAME_BYTES = 80  # a longer name is cut: a file system has 255 for it with what is added
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class NamedContext:
    """A context of several.

    Args:
        name: letters, digits, "_", "." and "-".
        text: at least one word.
        place: where it was read, for messages.
        queries, heldout, test: its own queries; None where it gives none.
    """

    name: str
    text: str
    place: str
    queries: tuple[Query, ...] | None = None
    heldout: tuple[Query, ...] | None = None
    test: tuple[Query, ...] | None = None


class Contexts(NamedTuple):
    """The contexts that can be read, in order, and the reason for each of the others by its name."""

    contexts: list[NamedContext]
    skipped: dict[str, str]


def holds_many(path: Path) -> bool:
    """Whether a path is for `read_contexts`: a folder, or a file that ends in .jsonl."""
    return path.suffix.lower() == ".jsonl" or path.is_dir()


def read_contexts(path: Path) -> Contexts:
    """Read a folder or a file of contexts.

    Raises:
        SoftPromptError: it cannot be read, or has no context that can.
    """
    found = Contexts([], {})
    for context in _of_folder(path) if path.is_dir() else _of_lines(path):
        if isinstance(context, NamedContext):
            found.contexts.append(context)
        else:
            found.skipped[context[0]] = context[1]
    if not found.contexts:
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(found.skipped.items())[:3])
        raise SoftPromptError(f"context: {path} holds no context that can be used{reasons or _EMPTY}")
    return found


_Found = NamedContext | tuple[str, str]


def _of_folder(folder: Path) -> Iterator[_Found]:
    taken: set[str] = set()
    try:
        files = sorted(file for file in folder.rglob("*") if file.is_file() or file.is_symlink())
    except OSError as error:
        raise SoftPromptError(f"context: {folder} cannot be read ({error.strerror})") from error
    for file in files:
        relative = file.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or file.is_dir():
            continue
        readable = relative.as_posix().encode(errors="replace").decode()
        name = _safe(readable.removesuffix(".txt")) or "text"
        if name.casefold() in taken:
            name = _with_digest(name, os.fsencode(relative.as_posix()))
        taken.add(name.casefold())
        try:
            yield NamedContext(name, _checked(read_utf8(file, readable), readable), readable)
        except SoftPromptError as error:
            yield name, str(error)


def _of_lines(path: Path) -> Iterator[_Found]:
    # Not splitlines(): a JSON string may contain U+2028 and the like, which do not end a line of the file.
    lines = read_utf8(path, f"context: {path}").split("\n")
    taken: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, name = f"{path.name}, line {number}", f"line-{number}"
        try:
            record = _record(line, place)
            name = _name(record.get("name"), name, place)
            first = taken.setdefault(name.casefold(), number)
            if first != number:
                clash, name = name, f"line-{number}"
                raise SoftPromptError(f"{place} has the name {clash!r} of line {first}, accepted is one of its own")
            yield _of_record(record, name, place)
        except SoftPromptError as error:
            # A line that is skipped does not take the name of another one.
            yield name if taken.setdefault(name.casefold(), number) == number else place, str(error)


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SoftPromptError(f"{place} is not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise SoftPromptError(f"{place} cannot be read as JSON ({error})") from error
    if not isinstance(record, dict):
        raise SoftPromptError(f'{place} is of type {type(record).__name__}, accepted is an object with "text"')
    return record


def _name(given: object, default: str, place: str) -> str:
    if given is None:
        return default
    if not isinstance(given, str) or not (name := _safe(given.encode(errors="replace").decode())):
        raise SoftPromptError(f'{place} has a "name" that is empty or not text; leave it out for {default!r}')
    return name


def _of_record(record: dict[str, Any], name: str, place: str) -> NamedContext:
    if extra := sorted(set(record) - set(_KEYS)):
        raise SoftPromptError(f'{place} has the unknown key "{extra[0]}", accepted are {", ".join(_KEYS)}')
    if "text" in record and "context" in record:
        raise SoftPromptError(f'{place} has both "text" and "context", accepted is one of them')
    text = record.get("text", record.get("context"))
    if not isinstance(text, str):
        raise SoftPromptError(f'{place} needs a "text" that is text')
    own = {key: _queries(record.get(key), f"{place}, {key}") for key in ("queries", "heldout", "test")}
    return NamedContext(name, _checked(text, place), place, **own)


def _queries(given: object, place: str) -> tuple[Query, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        raise SoftPromptError(f'{place} is not a list of queries, accepted is [{{"input": "..."}}, ...]')
    return tuple(query_of(one, f"{place} {number}") for number, one in enumerate(given, 1))


def _checked(text: str, place: str) -> str:
    if not text.strip():
        raise SoftPromptError(f"{place} is empty, accepted is text with at least one word")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise SoftPromptError(f"{place} has half of a surrogate pair, accepted is text that UTF-8 can encode")
    return text


def _safe(name: str) -> str:
    """A name that every file system accepts; empty if nothing of it is left. One that is cut ends with a digest."""
    found = _UNSAFE.sub("-", name).strip("-.")
    if len(found.encode()) <= _NAME_BYTES:
        return found
    return _with_digest(found.encode()[:_NAME_BYTES].decode(errors="ignore").rstrip("-."), name.encode())


def _with_digest(name: str, of: bytes) -> str:
    return f"{name}-{hashlib.sha256(of).hexdigest()[:8]}"
