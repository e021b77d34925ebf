"""MTOB (arXiv 2309.16575): translation between Kalamang and English, learnt from one grammar book.

A split such as `test_examples_ke.json` (Kalamang to English) or `test_examples_ek.json` (English to Kalamang) is a
list. The canary of the benchmark at its start is no example:

    [{"big-bench-canary": …}, {"original": "…", "ground_truth": "…"}]

The context is the grammar book, a text file. Scored by chrF over all translations.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.evaluate.suites.benchmark_file import BenchmarkFile
from softprompt_kernels.compress.evaluate.suites.suite import Suite
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError

_EXPECTED = 'test_examples_ke.json or test_examples_ek.json, a list of objects with "original" and "ground_truth"'
_DIRECTIONS = {"ke": ("Kalamang", "English"), "ek": ("English", "Kalamang")}


def read_mtob(path: Path, book: Path) -> Suite:
    """The grammar book, and sentences to translate.

    Args:
        path: of a split, whose name ends in "ke" or "ek".
        book: the text of the grammar book.

    Raises:
        SoftPromptError: a file cannot be read or has another format, or its name does not tell the direction.
    """
    direction = re.search(r"(?:^|_)(ke|ek)$", path.stem)
    if direction is None:
        raise SoftPromptError(f"file: the name of {path} does not end in ke or ek, accepted is {_EXPECTED}")
    file = BenchmarkFile(path, "MTOB", _EXPECTED)
    text = read_utf8(book, f"context: {book}")
    if not text.strip():
        raise SoftPromptError(f"context: {book} is empty, accepted is the text of the grammar book")
    source, target = _DIRECTIONS[direction[1]]
    queries = [
        _query(file, entry, f"[{number}]", source, target)
        for number, entry in enumerate(file.sequence(file.content, "the whole file"))
        if not (isinstance(entry, dict) and "big-bench-canary" in entry)
    ]
    if not queries:
        raise file.error("it has no sentences")
    origin = (("file", path.name), ("book", book.name))
    return Suite("mtob", "chrf", text, (), tuple(dict.fromkeys(queries)), origin=origin)


def _query(file: BenchmarkFile, content: Any, place: str, source: str, target: str) -> Query:
    entry = file.mapping(content, place)
    original = file.text(entry.get("original"), f"{place}.original")
    truth = file.text(entry.get("ground_truth"), f"{place}.ground_truth")
    question = f"Translate from {source} to {target}: {original}\nAnswer with the translation alone."
    return Query(question, references=(truth,))
