"""The answers of the full context and of the soft prompt to every question that was not trained on, for people to read.

Both are greedy, so a difference is one between the two, not one of sampling. The cost: each question is answered twice,
in batches behind the shared prefix.
"""

from __future__ import annotations

from softprompt_kernels.compress.inputs import RunInputs
from softprompt_kernels.compress.report.answers import Comparison, answers_page
from softprompt_kernels.compress.report.table import SETS
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.teacher.answers import answer
from softprompt_kernels.prompts import Prefix


def compared_answers(inputs: RunInputs, context: Prefix, prompt: Prefix, reporter: Reporter) -> str:
    """Both answers to each held-out and test question, as a page of Markdown.

    Args:
        inputs: the inputs of the run.
        context: the captured context.
        prompt: the prefix of the trained prompt.
        reporter: receives the progress.
    """
    config, titles = inputs.config, dict(SETS)
    sections: dict[str, list[Comparison]] = {}
    for name, queries in inputs.sets.items():
        if name == "train":
            continue
        asked = [Query(text) for text in dict.fromkeys(query.input for query in queries)]
        answers: dict[str, list[str]] = {}
        for reader, prefix in (("full context", context), ("soft prompt", prompt)):
            examples = answer(
                inputs.model,
                inputs.chat,
                prefix,
                asked,
                new_tokens=config.new_tokens,
                temperature=0.0,
                batch_size=config.sample_batch,
                seed=config.seed,
                reporter=reporter,
                description=f"Answers with the {reader}, {titles[name]} queries",
            )
            answers[reader] = inputs.as_text(examples)
        sections[titles[name]] = [
            Comparison(query.input, dict(zip(answers, texts, strict=True)))
            for query, *texts in zip(asked, *answers.values(), strict=True)
        ]
    return answers_page(sections, config.new_tokens)
