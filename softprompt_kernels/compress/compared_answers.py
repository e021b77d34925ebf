"""The answers of the full context and of the soft prompt to every question that was not trained on, for people to read.

Those of the full context are the teacher's answers that the run has anyway. Those of the soft prompt are sampled with
the same random numbers, so they differ only where the two distributions do. The cost: each question is answered once,
in batches behind the prompt's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.report.answers import Comparison, answers_page
from softprompt_kernels.compress.report.table import SETS
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import answer
from softprompt_kernels.prompts import Prefix


def prompt_answers(inputs: RunInputs, prompt: Prefix, reporter: Reporter) -> dict[str, list[str]]:
    """The answers with the prompt to each held-out and test question, by set, as text.

    Args:
        inputs: the inputs of the run.
        prompt: the prefix of the trained prompt.
        reporter: receives the progress.
    """
    config, sets = inputs.config, _sets(inputs)
    answers = answer(
        inputs.model,
        inputs.chat,
        prompt,
        [Query(query.input) for queries in sets.values() for query in queries],
        new_tokens=config.new_tokens,
        temperature=config.sample_temperature,
        batch_size=config.sample_batch,
        seed=config.seed,
        reporter=reporter,
        description="Answers with the soft prompt",
    )
    texts = iter(inputs.as_text(answers))
    return {name: list(islice(texts, len(queries))) for name, queries in sets.items()}


def compared_answers(
    inputs: RunInputs, examples: Mapping[str, Sequence[Example]], answers: Mapping[str, Sequence[str]]
) -> str:
    """Both answers to each held-out and test question, as a page of Markdown.

    Args:
        inputs: the inputs of the run.
        examples: by set, the questions with the teacher's answers, or with those that were given.
        answers: from `prompt_answers`.
    """
    config, titles = inputs.config, dict(SETS)
    sections = {}
    for name, queries in _sets(inputs).items():
        sections[titles[name]] = [
            Comparison(
                query.input, {"full context" if query.output is None else "given answer": text, "soft prompt": own}
            )
            for query, text, own in zip(queries, inputs.as_text(examples[name]), answers[name], strict=True)
        ]
    return answers_page(sections, config.new_tokens, config.sample_temperature)


def _sets(inputs: RunInputs) -> dict[str, tuple[Query, ...]]:
    return {name: queries for name, queries in inputs.sets.items() if name != "train"}
