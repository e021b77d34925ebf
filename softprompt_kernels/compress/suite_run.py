"""A suite from its text to its accuracy: the context is compressed, then its questions are asked.

    files → compress (context.txt, train.jsonl and self-study) → evaluate_prompt (test.jsonl) → figures.json

The test questions are not asked in training, and the facts that they ask for are not those that the suite's training
questions ask for. Self-study is different: it writes its queries from the text alone, without knowing the questions,
but it may happen on the same facts. So the figures say which tested facts a training query names, and give the accuracy
on these and on the others. `selfstudy=0` leaves only questions about other facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.evaluate.accuracy import accuracy, check_metric
from softprompt_kernels.compress.evaluate.answers import FULL, STUDENTS
from softprompt_kernels.compress.evaluate.dissimilarity import Dissimilarity
from softprompt_kernels.compress.evaluate.forgetting import general_text
from softprompt_kernels.compress.evaluate.suites.longhealth import read_longhealth
from softprompt_kernels.compress.evaluate.suites.made import make_suite
from softprompt_kernels.compress.evaluate.suites.mtob import read_mtob
from softprompt_kernels.compress.evaluate.suites.qasper import read_qasper
from softprompt_kernels.compress.evaluate.suites.suite import (
    MADE,
    Suite,
    SuiteFiles,
    check_suite_name,
    write_suite,
)
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.run import compress_one
from softprompt_kernels.compress.saved_prompt import evaluate_prompt, named_dissimilarity
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import load_tokenizer
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.sources.self_study import self_study
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts.json_file import to_json


def suite_of(
    name: str,
    model: str,
    *,
    length: int = 1024,
    needles: int = 12,
    seed: int = 0,
    file: Path | None = None,
    items: tuple[str, ...] = (),
    book: Path | None = None,
    new_tokens: int = 48,
    template_arguments: Mapping[str, Any] | None = None,
) -> Suite:
    """A suite for a model: its context and questions fit into the model's window. The weights are not read.

    Args:
        name: "needle", "multikey", "multivalue", "variables" or "pairs", which are made; or "longhealth", "qasper" or
            "mtob", which are read.
        model: folder or hub name of the model.
        length: of a made context, the most tokens.
        needles, seed: of a made suite, as in `make_suite`.
        file, items, book: of a suite that is read: the benchmark's file, which patients or papers (none: the first),
            and the grammar book of "mtob".
        new_tokens: at most so many tokens an answer.
        template_arguments: of the chat template.

    Raises:
        SoftPromptError: an unknown name, a file of another format, or a context or question that is too long.
    """
    check_suite_name(name)
    read = None if name in MADE else _read(name, file, items, book)
    if read is not None:
        check_metric(read.metric)
    tokenizer, window = load_tokenizer(model)
    if read is None and length >= window:
        raise SoftPromptError(f"length: got {length} tokens for a model with a window of {window}, accepted is less")
    chat = ChatFormat(tokenizer, template_arguments)

    def count_tokens(text: str) -> int:
        return int(chat.context_ids(text).shape[1])

    suite = read or make_suite(name, count_tokens, length, needles=needles, seed=seed)
    tokens = count_tokens(suite.context)
    longest = max(len(chat.query_ids(query.input)) for query in (*suite.train, *suite.test))
    if tokens + longest + new_tokens > window:
        raise SoftPromptError(
            f"{'length' if read is None else 'file'}: the context has {tokens} tokens, the longest question {longest} "
            f"and an answer up to {new_tokens}, accepted are {window} together, the model's window"
        )
    return suite


def _read(name: str, file: Path | None, items: tuple[str, ...], book: Path | None) -> Suite:
    if file is None:
        raise SoftPromptError(f"file: missing, but suite={name} is read from a file of the benchmark")
    if name == "longhealth":
        return read_longhealth(file, items)
    if name == "qasper":
        return read_qasper(file, items)
    if book is None:
        raise SoftPromptError("context: missing, but suite=mtob needs the text of the grammar book")
    return read_mtob(file, book)


def suite_config(folder: Path, path: Path | None, settings: Mapping[str, Any], trained: bool) -> CompressConfig:
    """The configuration of the compression of a suite: text, questions and output are those of the suite.

    Args:
        folder: of the suite.
        path: of a YAML file with settings; None: no file.
        settings: fields of `CompressConfig` that override the file.
        trained: whether the suite has training questions.

    Raises:
        SoftPromptError: as `load_config`.
    """
    files = SuiteFiles(folder)
    own = {
        "context": files.context,
        "output": files.run,
        "queries": files.train if trained else None,
        "heldout": None,
        "test": files.test,
    }
    return load_config(path, {**settings, **own})


def evaluate_suite(
    suite: Suite,
    folder: Path,
    config: CompressConfig,
    *,
    dissimilarity: str | Dissimilarity | None = None,
    general: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Compress the context of a suite and judge the answers to its test questions. The same call resumes.

    Args:
        suite: from `suite_of` or `make_suite`.
        folder: for the suite, the run and the figures.
        config: from `suite_config` with this folder.
        dissimilarity, general: as in `evaluate_prompt`.
        reporter: receives the progress; None reports nothing.

    Returns:
        As `evaluate_prompt`, with "suite": name, metric, origin, numbers of questions, and "named_in_training": how
        many test questions ask for a fact that a training query names, and the accuracies on these and on the others.
        It is written to figures.json.

    Raises:
        SoftPromptError: bad input; also what `compress` and `evaluate_prompt` raise.
    """
    reporter = reporter or SilentReporter()
    check_metric(suite.metric)
    general_text(general)
    named_dissimilarity(dissimilarity)
    files = write_suite(suite, folder)
    compress_one(config, reporter)
    figures = evaluate_prompt(
        config.model,
        files.context,
        files.run / "prompt",
        files.test,
        new_tokens=config.new_tokens,
        sample_temperature=config.sample_temperature,
        seed=config.seed,
        template_arguments=config.template_arguments,
        dtype=config.dtype,
        device=config.device,
        reporter=reporter,
        dissimilarity=dissimilarity,
        metric=suite.metric,
        general=general,
    )
    figures["suite"] = {
        "name": suite.name,
        "metric": suite.metric,
        **dict(suite.origin),
        "train_questions": len(suite.train),
        "test_questions": len(suite.test),
        **_named(suite, config, figures["answers"]["answers"]),
    }
    write_text(files.figures, json.dumps(to_json("figures", figures), indent=1, allow_nan=False) + "\n")
    return figures


def _named(suite: Suite, config: CompressConfig, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """How many tested facts training queries name, with the accuracy on these and on the others."""
    if not suite.subjects:
        return {}
    asked = [query.input for query in (*suite.train, *self_study(suite.context, config.selfstudy, config.seed))]
    named = [names_fact(asked, subject) for subject in suite.subjects]
    figures: dict[str, Any] = {"named_in_training": sum(named)}
    for key, wanted in (("accuracy_named", True), ("accuracy_not_named", False)):
        chosen = [answer for answer, is_named in zip(answers, named, strict=True) if is_named == wanted]
        if chosen:
            references = [answer["references"] for answer in chosen]
            figures[key] = {
                student: accuracy(suite.metric, [answer[student] for answer in chosen], references)
                for student in (FULL, *STUDENTS)
                if student in chosen[0]
            }
    return figures


def names_fact(queries: list[str], subject: tuple[str, ...]) -> bool:
    """Whether a query has one of the words of `subject`, as whole words and in any case.

    Args:
        queries: the texts of training queries.
        subject: from `Suite.subjects`.
    """
    pattern = re.compile("|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in subject), re.IGNORECASE)
    return any(pattern.search(query) for query in queries)
