"""The distance of a student from the teacher, on tokens that the teacher wrote.

    KL            mean over tokens of KL(p_t ‖ p_s) over the full vocabulary, nats
    recovered     1 − KL / KL without context: 0 is as bad as no context, 1 as good as the full context
    top-1         share of tokens for which student and teacher have the same most likely token
    entropy gap   mean of H(p_s) − H(p_t), nats: below 0 the student is too certain, above 0 too uncertain

Top-1 agreement alone hides a ruined distribution, so the KL is always reported. If the KL without context is near 0,
the context does not matter for these queries: "recovered" would divide noise by noise, and the queries are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.ops import linear_kl_div
from softprompt_kernels.prompts import Prefix

NEGLIGIBLE_KL = 1e-3
"""Nats per token. If the KL without context is at most this, the context does not matter."""

_ROWS = 256  # rows of logits in memory at once


@dataclass(frozen=True)
class Distance:
    """The distance of a student from the teacher: means over `tokens` tokens."""

    kl: float
    top1_agreement: float
    entropy_gap: float
    tokens: int


@torch.no_grad()
def distance(head: Head, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Distance:
    """The distance between the hidden states `[n_i, d]` of student and teacher, one tensor for each example."""
    student_rows, teacher_rows = torch.cat(list(student)), torch.cat(list(teacher))
    kl = linear_kl_div(
        student_rows, teacher_rows, head.weight, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    # Logits in fp32: rounded to 16 bits, different logits become equal, and argmax takes the lower token.
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
    *,
    teacher: Sequence[Tensor] | None = None,
) -> dict[str, Distance]:
    """The distances of several students from the teacher, on the same examples.

    Args:
        model: prepared.
        context: the teacher's prefix.
        students: the students' prefixes, by key; None is the model without a prefix.
        examples: queries with answers of the teacher.
        reporter: receives the progress.
        name: what the progress calls the set of examples.
        teacher: the teacher's hidden states of the examples, if they are known.

    Returns:
        The distances, by the same keys.
    """
    head, names = head_of(model), {key: label[0].upper() + label[1:] for key, label in STUDENT_NAMES.items()}
    if teacher is None:
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
    """The figures of one set of queries, as in evaluation.json.

    Args:
        distances: by key, with "none", "prompt" and any baselines.

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
    """Raise SoftPromptError if the model answers the queries nearly the same without the context."""
    if not kl_none > NEGLIGIBLE_KL:
        raise SoftPromptError(
            f"queries: the KL without context is {kl_none:.2g} nats per token, so the context does not matter for "
            f"these queries; accepted is more than {NEGLIGIBLE_KL:g}"
        )


def _entropy(logits: Tensor) -> Tensor:
    """`[n]`: the entropy of each row of logits `[n, V]`, nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
