"""Makes the details of a run's evaluation from what the evaluation measured.

The figures are those that the evaluation computes anyway, so this costs no pass through the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress.evaluate.details import ExampleDetails
from softprompt_kernels.compress.evaluate.distance import TokenDistances
from softprompt_kernels.compress.evaluate.token_texts import token_texts
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Example

GIVEN = "given"
"""The family of a query from a file that names none."""


def example_details(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    examples: Sequence[Example],
    students: Mapping[str, TokenDistances],
    ends: AbstractSet[int],
    prompt_answers: Sequence[str] | None = None,
) -> tuple[ExampleDetails, ...]:
    """The details of one set of queries.

    Args:
        tokenizer: of the model.
        queries: as they were asked; the output of a query is None unless it was given.
        examples: the same queries, with their answers.
        students: what was measured on these examples, one after the other, by the student's key.
        ends: the tokens that end an answer.
        prompt_answers: the answers of the model with the soft prompt; None if it was not asked.
    """
    lengths = [example.targets for example in examples]
    kl = {name: found.kl.split(lengths) for name, found in students.items()}
    agrees = {name: found.agrees.split(lengths) for name, found in students.items()}
    entropy = next(iter(students.values())).teacher_entropy.split(lengths)
    return tuple(
        ExampleDetails(
            query=query.input,
            family=query.family or GIVEN,
            tokens=token_texts(tokenizer, example.output_ids),
            kl={name: _rounded(of_student[index]) for name, of_student in kl.items()},
            agrees={name: tuple(of_student[index].tolist()) for name, of_student in agrees.items()},
            entropy=_rounded(entropy[index]),
            ended=query.output is not None or example.output_ids[-1] in ends,
            prompt_answer=None if prompt_answers is None else prompt_answers[index],
        )
        for index, (query, example) in enumerate(zip(queries, examples, strict=True))
    )


def error_rows(error: Tensor | None) -> tuple[tuple[float, ...], ...] | None:
    """An error `[layers, heads]` as `Details.match_error` holds it."""
    return None if error is None else tuple(_rounded(layer) for layer in error)


def _rounded(values: Tensor) -> tuple[float, ...]:
    """Five significant digits: more would only make the file larger."""
    return tuple(float(f"{value:.5g}") for value in values.tolist())
