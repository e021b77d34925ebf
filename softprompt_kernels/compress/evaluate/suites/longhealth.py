"""LongHealth (arXiv 2401.14490): multiple-choice questions about the documents of fictional patients.

`benchmark_v5.json` of its repository maps a patient to name, birthday, diagnosis, texts and questions:

    {"patient_01": {"name": …, "birthday": …, "diagnosis": …, "texts": {"text_0": …},
                    "questions": [{"question": …, "answer_a": …, …, "answer_e": …, "correct": text of the right one}]}}

The context is all documents of the chosen patients. The task is the first of the benchmark: the answer is in the text.
Accuracy is the share of questions whose right letter is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.evaluate.suites.benchmark_file import BenchmarkFile
from softprompt_kernels.compress.evaluate.suites.suite import Suite
from softprompt_kernels.compress.sources.queries import Query

LETTERS = "ABCDE"
_EXPECTED = 'benchmark_v5.json, an object of patients with "texts" and "questions"'


def read_longhealth(path: Path, items: Sequence[str]) -> Suite:
    """The documents of patients, and the questions about them.

    Args:
        path: of benchmark_v5.json.
        items: patients, such as "patient_01"; none: the first one.

    Raises:
        SoftPromptError: the file has another format, or lacks a patient.
    """
    file = BenchmarkFile(path, "LongHealth", _EXPECTED)
    patients = file.chosen(items)
    parts, queries = [], []
    for name, content in patients.items():
        patient = file.mapping(content, name)
        facts = [str(patient[key]) for key in ("name", "birthday", "diagnosis") if patient.get(key)]
        parts.append(f"Patient: {', '.join(facts) or name}")
        texts = file.mapping(patient.get("texts"), f"{name}.texts")
        parts += [file.text(text, f"{name}.texts.{key}") for key, text in texts.items()]
        about = f"About {facts[0]}: " if len(patients) > 1 and facts else ""
        for number, question in enumerate(file.sequence(patient.get("questions"), f"{name}.questions")):
            queries.append(_query(file, question, f"{name}.questions[{number}]", about))
    origin = (("file", path.name), ("items", " ".join(patients)))
    return Suite("longhealth", "choice", "\n\n".join(parts), (), tuple(queries), origin=origin)


def _query(file: BenchmarkFile, question: Any, place: str, about: str) -> Query:
    fields: Mapping[str, Any] = file.mapping(question, place)
    options = {one: file.text(fields.get(f"answer_{one.lower()}"), f"{place}.answer_{one.lower()}") for one in LETTERS}
    correct = file.text(fields.get("correct"), f"{place}.correct")
    letter = next((one for one, text in options.items() if text == correct), None)
    if letter is None:
        raise file.error(f"{place}.correct is none of its answers")
    lines = [about + file.text(fields.get("question"), f"{place}.question")]
    lines += [f"{one}: {text}" for one, text in options.items()]
    return Query("\n".join([*lines, "Answer with the letter of the right option."]), references=(letter, correct))
