"""QASPER (arXiv 2105.03011): questions about a scientific paper, each with answers of several annotators.

`qasper-test-v0.3.json` and the like map the number of a paper to its text and questions:

    {"1909.00694": {"title": …, "abstract": …, "full_text": [{"section_name": …, "paragraphs": […]}],
                    "qas": [{"question": …, "answers": [{"answer": {"unanswerable": false, "extractive_spans": […],
                             "free_form_answer": …, "yes_no": null}}]}]}}

An answer is "Unanswerable", the extractive spans joined by commas, the free-form answer, or "Yes" or "No", in the order
of the benchmark's evaluator. The score of a question is the best F1 of the words over its answers, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.evaluate.suites.benchmark_file import BenchmarkFile
from softprompt_kernels.compress.evaluate.suites.suite import Suite
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.text_file import trim

_EXPECTED = 'qasper-test-v0.3.json or another split, an object of papers with "full_text" and "qas"'
_HOW = 'Answer in a few words. Say "Yes" or "No" where that is asked, and "Unanswerable" if the paper does not say.'


def read_qasper(path: Path, items: Sequence[str]) -> Suite:
    """Papers and the questions about them.

    Args:
        path: of a split.
        items: numbers of papers, such as "1909.00694"; none: the first one.

    Raises:
        SoftPromptError: the file has another format, or lacks a paper.
    """
    file = BenchmarkFile(path, "QASPER", _EXPECTED)
    papers = file.chosen(items)
    parts: list[str] = []
    queries: list[Query] = []
    for name, content in papers.items():
        paper = file.mapping(content, name)
        title = file.text(paper.get("title"), f"{name}.title")
        parts += [title, *([file.text(paper["abstract"], f"{name}.abstract")] if paper.get("abstract") else [])]
        for number, section in enumerate(file.sequence(paper.get("full_text"), f"{name}.full_text")):
            parts += _section(file, section, f"{name}.full_text[{number}]")
        about = f'About "{title}": ' if len(papers) > 1 else ""
        for number, question in enumerate(file.sequence(paper.get("qas"), f"{name}.qas")):
            queries.append(_query(file, question, f"{name}.qas[{number}]", about))
    context = "\n\n".join(part.strip() for part in parts if part.strip())
    origin = (("file", path.name), ("items", " ".join(papers)))
    return Suite("qasper", "f1", context, (), tuple(dict.fromkeys(queries)), origin=origin)


def _section(file: BenchmarkFile, content: Any, place: str) -> list[str]:
    section = file.mapping(content, place)
    paragraphs = section.get("paragraphs")
    if not isinstance(paragraphs, list):
        raise file.error(f"{place}.paragraphs is no list of texts")
    texts = [section.get("section_name"), *paragraphs]  # some are empty, and a section may have no name
    return [file.text(text, f"{place}.paragraphs") for text in texts if text]


def _query(file: BenchmarkFile, content: Any, place: str, about: str) -> Query:
    question = file.mapping(content, place)
    answers = file.sequence(question.get("answers"), f"{place}.answers")
    references = []
    for number, annotation in enumerate(answers):
        where = f"{place}.answers[{number}]"
        answer = file.mapping(file.mapping(annotation, where).get("answer"), f"{where}.answer")
        references.append(file.text(_answer(file, answer, f"{where}.answer"), f"{where}.answer"))
    text = trim(file.text(question.get("question"), f"{place}.question"))
    return Query(f"{about}{text}\n{_HOW}", references=tuple(dict.fromkeys(references)))


def _answer(file: BenchmarkFile, answer: Mapping[str, Any], place: str) -> str:
    said = answer.get("yes_no")
    if answer.get("unanswerable"):
        return "Unanswerable"
    if spans := answer.get("extractive_spans"):
        return ", ".join(map(str, file.sequence(spans, f"{place}.extractive_spans")))
    if isinstance(said, bool) and not answer.get("free_form_answer"):
        return "Yes" if said else "No"
    return file.text(answer.get("free_form_answer"), place)
