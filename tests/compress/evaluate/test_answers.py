"""Whole answers of teacher and students, their figures and their table."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, SilentReporter
from softprompt_kernels.compress.evaluate.answers import FULL, GreedyAnswers, answer_figures, greedy_answers
from softprompt_kernels.compress.report.answer_table import answer_remark, answer_table
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.models import generate
from softprompt_kernels.prompts import Prefix

QUERIES = [
    Query("Who keeps it?", None, references=("Mira Vale", "the miller")),
    Query("Where?"),
    Query("How?", "So.", references=("7",)),
]
TEXTS = {
    FULL: ["Mira Vale", "on the Osk", "with 7"],
    "none": ["nobody", "on the Osk", "so"],
    "prompt": ["Mira Vale.", "on the river Osk", "with 8"],
}
ANSWERS = GreedyAnswers(TEXTS, {FULL: 0, "none": 2, "prompt": 1})


def test_answers_are_the_most_likely_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Prefix
) -> None:
    chat = ChatFormat(tokenizer)
    found = greedy_answers(model, chat, {FULL: context, "none": None}, QUERIES, 5, SilentReporter())
    for key, prefix in ((FULL, context), ("none", None)):
        for query, text in zip(QUERIES, found.texts[key], strict=True):
            ids = torch.tensor([chat.query_ids(query.input)])
            tokens = generate(model, ids, prefix, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
            assert text == str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    assert found.texts[FULL] != found.texts["none"]
    assert found.cut_off == {FULL: 3, "none": 3}


def test_an_answer_that_ends_by_itself_is_not_cut_off(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat(tokenizer)
    ids = torch.tensor([chat.query_ids(QUERIES[0].input)])
    first = int(generate(model, ids, context, max_new_tokens=1, do_sample=False)[0, -1])
    monkeypatch.setitem(chat.__dict__, "end_tokens", frozenset([first]))
    found = greedy_answers(model, chat, {FULL: context}, QUERIES[:1], 5, SilentReporter())
    assert found.cut_off == {FULL: 0}


def test_students_are_compared_with_the_full_context_and_judged_by_references() -> None:
    figures = answer_figures(ANSWERS, QUERIES)
    assert figures["dissimilarity"]["mismatch"] == {"none": pytest.approx(2 / 3), "prompt": pytest.approx(2 / 3)}
    assert figures["dissimilarity"]["f1_distance"]["prompt"] == pytest.approx((0 + (1 - 2 * 2 / 5) + 0.5) / 3)
    assert (figures["queries"], figures["questions"]) == (3, 2)
    assert figures["accuracy"]["exact_match"] == {FULL: 0.5, "none": 0, "prompt": 0.5}
    assert figures["accuracy"]["contains"] == {FULL: 1, "none": 0, "prompt": 0.5}
    assert figures["answers"][0] == {
        "input": "Who keeps it?",
        "references": ["Mira Vale", "the miller"],
        FULL: "Mira Vale",
        "none": "nobody",
        "prompt": "Mira Vale.",
    }
    assert "references" not in figures["answers"][1]


def test_without_references_there_is_no_accuracy() -> None:
    one = GreedyAnswers({key: of[1:2] for key, of in TEXTS.items()}, {FULL: 1})
    figures = answer_figures(one, QUERIES[1:2])
    assert not {"accuracy", "questions"} & set(figures)
    assert "right" not in answer_remark(figures)
    assert "1 of 1 answers of the full context were cut off by --new-tokens" in answer_remark(figures)
    assert answer_table(figures)[0] == ["model with", "mismatch", "edit distance", "1 - F1"]


def test_the_users_own_dissimilarity_and_metric_have_their_columns() -> None:
    def sizes(one: str, other: str) -> float:
        return float(len(one) != len(other))

    figures = answer_figures(ANSWERS, QUERIES, own={"mine:sizes": sizes}, metric="contains_all")
    assert figures["dissimilarity"]["mine:sizes"] == {"none": pytest.approx(2 / 3), "prompt": pytest.approx(2 / 3)}
    assert figures["accuracy"] == {"contains_all": {FULL: 0.75, "none": 0, "prompt": 0.25}}
    header, rows = answer_table(figures)
    assert header == ["model with", "mismatch", "edit distance", "1 - F1", "mine:sizes", "right (found)"]
    assert [row[0] for row in rows] == ["no context", "soft prompt", "full context"]
    assert rows[-1] == ["full context", "0.000", "0.000", "0.000", "0.000", "0.750"]
    assert rows[1][-2:] == ["0.667", "0.250"]
    assert "2 of 3 queries" in answer_remark(figures) and "cut off" not in answer_remark(figures)


def test_every_student_of_the_figures_has_a_row() -> None:
    four = GreedyAnswers({**TEXTS, "truncated": ["", "", ""]}, {FULL: 0})
    assert len(answer_table(answer_figures(four, QUERIES))[1]) == 4
