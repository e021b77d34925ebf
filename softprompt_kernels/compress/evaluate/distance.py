"""How far a student is from the teacher: always the KL over the full vocabulary, on tokens that the teacher wrote.

    KL            mean over tokens of KL(p_t ‖ p_s), nats
    recovered     1 − KL / KL of the model with no prompt at all: 0 is nothing gained, 1 is the full context
    top-1         share of tokens whose most likely next token is the same
    entropy gap   mean of H(p_s) − H(p_t), nats: a student that is too sure, or too unsure, shows here

Agreement alone hides a ruined distribution, hence the KL. A KL of nothing near 0 means that the context does not matter
for these queries; recovered would be noise over noise, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.evaluate.baselines import ROWS
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.ops import linear_kl_div
from softprompt_kernels.prompts import Prefix

MEANINGLESS_KL = 1e-3
"""Nats per token below which the context is said not to matter."""

_ROWS = 256  # whose logits are alive at once


@dataclass(frozen=True)
class Distance:
    """Student against teacher, means over `tokens`."""

    kl: float
    top1_agreement: float
    entropy_gap: float
    tokens: int


@torch.no_grad()
def distance(head: Head, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Distance:
    """Compare hidden states `[n_i, d]` of the same tokens, example by example."""
    student_rows, teacher_rows = torch.cat(list(student)), torch.cat(list(teacher))
    kl = linear_kl_div(
        student_rows, teacher_rows, head.weight, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    # Logits in fp32: rounded to 16 bits they tie, and a tie goes to the lower token.
    exact = replace(head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())
    agreement = gap = 0.0
    for s, t in zip(student_rows.split(_ROWS), teacher_rows.split(_ROWS), strict=True):
        student_logits, teacher_logits = exact.logits(s.float()), exact.logits(t.float())
        agreement += float((student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum())
        gap += float((_entropy(student_logits) - _entropy(teacher_logits)).sum())
    tokens = student_rows.shape[0]
    return Distance(float(kl), agreement / tokens, gap / tokens, tokens)


def measure(
    model: PreTrainedModel,
    context: Prefix,
    students: Mapping[str, Prefix | None],
    examples: Sequence[Example],
    reporter: Reporter,
    name: str,
) -> dict[str, Distance]:
    """Distance of several students from the teacher that reads `context`, on the same examples.

    Args:
        model: prepared.
        context: the teacher's prefix.
        students: by name; None is the model alone.
        examples: queries with outputs that the teacher wrote.
        reporter: told of the progress.
        name: of the set of examples, for the reader.
    """
    head, names = head_of(model), {key: row.capitalize() for key, row in ROWS}
    teacher = hidden_states(model, context, examples, reporter, f"Full context, {name} queries")
    return {
        student: distance(
            head,
            hidden_states(model, prefix, examples, reporter, f"{names.get(student, student)}, {name} queries"),
            teacher,
        )
        for student, prefix in students.items()
    }


def summary(distances: Mapping[str, Distance]) -> dict[str, float | int]:
    """The figures of one set of queries, as evaluation.json has them.

    `distances` has "none" and "prompt", and the baselines that were measured.

    Raises:
        SoftPromptError: the context does not matter for these queries.
    """
    none, prompt = distances["none"], distances["prompt"]
    check_context_matters(none.kl)
    return {
        **{f"kl_{name}": value.kl for name, value in distances.items()},
        "recovered": 1 - prompt.kl / none.kl,
        "top1_agreement": prompt.top1_agreement,
        "entropy_gap": prompt.entropy_gap,
        **{f"top1_agreement_{name}": value.top1_agreement for name, value in distances.items() if name != "prompt"},
        "tokens": prompt.tokens,
    }


def check_context_matters(kl_none: float) -> None:
    """Refuses queries that the model answers the same without the context."""
    if not kl_none > MEANINGLESS_KL:
        raise SoftPromptError(
            f"queries: without the context the model is {kl_none:.2g} nats per token from the model with it, so the "
            f"context does not matter for these queries; accepted is more than {MEANINGLESS_KL:g}"
        )


def _entropy(logits: Tensor) -> Tensor:
    """`[n]`, nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
