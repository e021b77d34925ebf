"""Queries: the inputs z that the prompt is trained and evaluated on, each with the teacher's output y once it is known.

They come from a file of JSON Lines, `{"input": "...", "output": "...", "family": "...", "references": ["..."]}`, where
all keys but the first are optional, or from self-study (`self_study.py`). References are answers that count as right.
Only evaluation reads them. Training and held-out queries have no input in common, so the answers to one question are
all in the same set.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt_kernels.compress.text_file import read_utf8, trim
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import replaced_when_complete


@dataclass(frozen=True)
class Query:
    """One input, and its output; None if the teacher has not answered yet.

    Args:
        input: the text of the query.
        output: the answer that the student learns.
        family: the kind of query, by which an evaluation is broken down: "general", "phrase" or "sentence" from
            self-study, any name from a file; None if it has none.
        references: the accepted answers, for evaluation; empty where none are known.
        lead: tokens that are read before the query, such as text that follows on the context.
    """

    input: str
    output: str | None = None
    family: str | None = None
    references: tuple[str, ...] = ()
    lead: tuple[int, ...] = ()


def load_queries(path: Path) -> list[Query]:
    """Read a file of JSON Lines. Blank lines are skipped.

    Raises:
        SoftPromptError: the file cannot be read, holds no query, or has an invalid line, which is named by its number.
    """
    # Not splitlines(): a JSON string may contain U+2028 and the like, which do not end a line of the file.
    lines = read_utf8(path, f"queries: {path}").split("\n")
    queries = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not queries:
        raise SoftPromptError(f"queries: {path} holds no query, accepted is at least one line")
    return queries


def save_queries(path: Path, parts: dict[str, Sequence[Query]]) -> None:
    """Write queries as JSON Lines, each with the name of its part as "split"."""
    lines = (json.dumps(_record(query, split), ensure_ascii=False) for split in parts for query in parts[split])
    write_text(path, "".join(f"{line}\n" for line in lines))


def _record(query: Query, split: str) -> dict[str, object]:
    family = {} if query.family is None else {"family": query.family}
    references = {"references": query.references} if query.references else {}
    return {"input": query.input, "output": query.output, **family, **references, "split": split}


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: under a temporary name, which is then renamed."""
    with replaced_when_complete(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def hold_out(queries: Sequence[Query], share: float, seed: int) -> tuple[list[Query], list[Query]]:
    """`(training, held-out)` queries. `share` of the different inputs, at least one and not all, is held out.

    Raises:
        SoftPromptError: fewer than two different inputs.
    """
    inputs = sorted({query.input for query in queries})
    if len(inputs) < 2:
        raise SoftPromptError(f"queries: got {len(inputs)} different input, accepted are two or more: one is held out")
    random.Random(seed).shuffle(inputs)
    held = set(inputs[: min(max(1, round(share * len(inputs))), len(inputs) - 1)])
    return [q for q in queries if q.input not in held], [q for q in queries if q.input in held]


def remove_held_out(queries: Iterable[Query], held_out: Iterable[Query]) -> list[Query]:
    """The queries whose input is not held out."""
    inputs = {query.input for query in held_out}
    return [query for query in queries if query.input not in inputs]


def _parse(line: str, place: str) -> Query:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SoftPromptError(f"queries: {place} is not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise SoftPromptError(f"queries: {place} cannot be read as JSON ({error})") from error
    return query_of(record, place)


def query_of(record: object, place: str) -> Query:
    """The query of a line, from its JSON.

    Args:
        record: an object as in the head of this file.
        place: where it stands, for error messages.

    Raises:
        SoftPromptError: the record is invalid.
    """
    if not isinstance(record, dict):
        raise SoftPromptError(
            f'queries: {place} is of type {type(record).__name__}, accepted is an object with "input"'
        )
    extra = sorted(set(record) - {"input", "output", "family", "references", "split"})
    if extra:
        raise SoftPromptError(
            f'queries: {place} has the unknown key "{extra[0]}", accepted are "input", "output", "family" and '
            '"references"'
        )
    if not isinstance(record.get("input"), str) or not record["input"].strip():
        raise SoftPromptError(f'queries: {place} needs an "input" that is text and not empty')
    output = record.get("output")
    if output is not None and (not isinstance(output, str) or not output.strip()):
        raise SoftPromptError(f'queries: {place} has an "output" that is empty or not text; leave it out to sample one')
    family = record.get("family")
    if family is not None and (not isinstance(family, str) or not family.strip()):
        raise SoftPromptError(f'queries: {place} has a "family" that is empty or not text; leave it out for none')
    references = _references(record.get("references"), place)
    texts = "".join((record["input"], output or "", family or "", *references))
    if any("\ud800" <= character <= "\udfff" for character in texts):
        raise SoftPromptError(f"queries: {place} has half of a surrogate pair, accepted is text that UTF-8 can encode")
    # Without trim(), one question with different blanks around it would count as two and could be in both sets.
    return Query(trim(record["input"]), output, None if family is None else family.strip(), references)


def _references(given: object, place: str) -> tuple[str, ...]:
    """The accepted answers of a line: a text or a list of texts; none if it has none."""
    if given is None:
        return ()
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) and one.strip() for one in listed):
        raise SoftPromptError(
            f'queries: {place} has "references" that are not text or a list of texts, accepted is one answer, such as '
            '"seven", or several: ["seven", "7"]'
        )
    return tuple(listed)
