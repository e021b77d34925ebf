"""Whole answers: what the model says with the full context, the prompt, as many tokens of the context, and nothing.

The distances of `distance.py` are of next-token distributions along the teacher's answer. Here each student writes its
own answer, greedily: its most likely token each time. The answers are compared with that of the full text
(`dissimilarity.py`), and with references where the queries have them (`accuracy.py`).

Cost: each query is answered once behind each prefix, in batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from softprompt_kernels.compress.evaluate.accuracy import GENERAL_METRICS, accuracy
from softprompt_kernels.compress.evaluate.dissimilarity import DISSIMILARITIES, Dissimilarity, mean_dissimilarity
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.teacher.answers import answer, end_tokens
from softprompt_kernels.prompts import Prefix

FULL = "full"
"""The key of the answers with the full text, in the figures."""

_NAMES = {FULL: "the full context", "none": "no context", "truncated": "the truncated context", "prompt": "the prompt"}

STUDENTS = ("none", "truncated", "prompt")
"""The students that answer, by their key in evaluation.json; a prompt as long as the text has none "truncated"."""


@dataclass(frozen=True)
class GreedyAnswers:
    """Answers by the key of the prefix that they were written behind.

    Args:
        texts: the answers to all queries.
        cut_off: how many of them ended at the most tokens that an answer may have, and not by themselves.
    """

    texts: Mapping[str, Sequence[str]]
    cut_off: Mapping[str, int]


def greedy_answers(
    model: PreTrainedModel,
    chat: ChatFormat,
    prefixes: Mapping[str, Prefix | None],
    queries: Sequence[Query],
    new_tokens: int,
    reporter: Reporter,
) -> GreedyAnswers:
    """The greedy answers to all queries behind each prefix, as text.

    Args:
        model, chat: the model and its chat format.
        prefixes: what is read before each query; None: nothing.
        queries: any number. Outputs that they have are not used.
        new_tokens: at most so many tokens an answer.
        reporter: receives the progress.
    """
    ends = end_tokens(model, chat)
    texts, cut_off = {}, {}
    for key, prefix in prefixes.items():
        examples = answer(
            model,
            chat,
            prefix,
            [Query(query.input) for query in queries],
            new_tokens=new_tokens,
            temperature=0.0,
            batch_size=64,
            seed=0,
            reporter=reporter,
            description=f"Answers with {_NAMES[key]}",
        )
        decode = chat.tokenizer.decode
        texts[key] = [str(decode(list(e.output_ids), skip_special_tokens=True)).strip() for e in examples]
        cut_off[key] = sum(example.output_ids[-1] not in ends for example in examples)
    return GreedyAnswers(texts, cut_off)


def answer_figures(
    given: GreedyAnswers,
    queries: Sequence[Query],
    *,
    own: Mapping[str, Dissimilarity] | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """The figures of whole answers.

    Args:
        given: of `FULL` and any of `STUDENTS`, from `greedy_answers`.
        queries: of the answers, in the same order.
        own: dissimilarities of the user, by name.
        metric: of accuracy, as in `accuracy`; None: all of `GENERAL_METRICS`.

    Returns:
        `{"queries", "cut_off": {student: number}, "dissimilarity": {name: {student: mean}}, "accuracy": {metric:
        {student: mean}}, "questions", "answers": [{"input", "references", student: text, ...}]}`. Students are the keys
        of the answers. "accuracy" and "questions", their number, are there if queries have references.

    Raises:
        SoftPromptError: as `mean_dissimilarity` and `accuracy`.
    """
    answers = given.texts
    full = answers[FULL]
    students = [key for key in answers if key != FULL]
    measures = {**DISSIMILARITIES, **(own or {})}
    figures: dict[str, Any] = {
        "queries": len(queries),
        "cut_off": dict(given.cut_off),
        "dissimilarity": {
            name: {key: mean_dissimilarity(name, function, full, answers[key]) for key in students}
            for name, function in measures.items()
        },
    }
    known = [index for index, query in enumerate(queries) if query.references]
    if known:
        references = [queries[index].references for index in known]
        figures["questions"] = len(known)
        figures["accuracy"] = {
            name: {key: accuracy(name, [texts[i] for i in known], references) for key, texts in answers.items()}
            for name in ((metric,) if metric else GENERAL_METRICS)
        }
    figures["answers"] = [
        {
            "input": query.input,
            **({"references": list(query.references)} if query.references else {}),
            **{key: texts[index] for key, texts in answers.items()},
        }
        for index, query in enumerate(queries)
    ]
    return figures
