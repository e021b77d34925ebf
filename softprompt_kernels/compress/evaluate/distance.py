"""The distance of a student from the teacher, on tokens that the teacher wrote.

    KL            mean over tokens of KL(p_t ‖ p_s) over the full vocabulary, nats
    recovered     1 − KL / KL without context: 0 is as bad as no context, 1 as good as the full context
    top-1         share of tokens for which student and teacher have the same most likely token
    entropy gap   mean of H(p_s) − H(p_t), nats: below 0 the student is too certain, above 0 too uncertain

Top-1 agreement alone hides a ruined distribution, so the KL is always reported. If the KL without context is near 0,
the context does not matter for these queries: "recovered" would divide noise by noise, and the queries are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.teacher.moments_cache import row_entropies
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.ops import kl_div
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


@dataclass(frozen=True, eq=False)
class TokenDistances:
    """The distance of a student from the teacher at each of n tokens, on the CPU.

    Args:
        kl: `[n]` fp32, nats.
        agrees: `[n]` bool: the most likely token is the teacher's.
        entropy: `[n]` fp32, of the student, nats.
        teacher_entropy: `[n]` fp32, nats.
    """

    kl: Tensor
    agrees: Tensor
    entropy: Tensor
    teacher_entropy: Tensor

    def mean(self) -> Distance:
        """The means over the tokens."""
        tokens = self.kl.numel()
        gap = float(self.entropy.double().sum() - self.teacher_entropy.double().sum()) / tokens
        return Distance(float(self.kl.double().sum()) / tokens, float(self.agrees.sum()) / tokens, gap, tokens)


def distance(head: Head, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Distance:
    """The distance between the hidden states `[n_i, d]` of student and teacher, one tensor for each example."""
    return token_distances(head, {"student": torch.cat(list(student))}, torch.cat(list(teacher)))["student"].mean()


@torch.no_grad()
def token_distances(head: Head, students: Mapping[str, Tensor], teacher: Tensor) -> dict[str, TokenDistances]:
    """The distances of several students, by their keys. The teacher's logits are computed once for all of them.

    Args:
        head: of the model.
        students, teacher: hidden states `[n, d]`.
    """
    # Logits in fp32: rounded to 16 bits, different logits become equal, and argmax takes the lower token.
    exact = replace(head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in students}
    for start in range(0, teacher.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        teacher_logits = exact.logits(teacher[rows].float())
        top, teacher_entropy = teacher_logits.argmax(-1), row_entropies(teacher_logits)
        for name, hidden in students.items():
            logits = exact.logits(hidden[rows].float())
            kl = kl_div(logits, teacher_logits, reduction="none")
            found[name].append((kl, logits.argmax(-1) == top, row_entropies(logits), teacher_entropy))
    return {
        name: TokenDistances(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
        if parts
        else TokenDistances(torch.empty(0), torch.empty(0, dtype=torch.bool), torch.empty(0), torch.empty(0))
        for name, parts in found.items()
    }


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
    """The distances of several students from the teacher, on the same examples: means of `measure_tokens`."""
    found = measure_tokens(model, context, students, examples, reporter, name, teacher=teacher)
    return {student: of_student.mean() for student, of_student in found.items()}


def measure_tokens(
    model: PreTrainedModel,
    context: Prefix | None,
    students: Mapping[str, Prefix | None],
    examples: Sequence[Example],
    reporter: Reporter,
    name: str,
    *,
    teacher: Sequence[Tensor] | None = None,
) -> dict[str, TokenDistances]:
    """The distances of several students from the teacher at each token, example after example.

    Of many ranks each measures a share of the examples, and all get all distances.

    Args:
        model: prepared.
        context: the teacher's prefix; not read if its hidden states are known.
        students: the students' prefixes, by key; None is the model without a prefix.
        examples: queries with answers of the teacher.
        reporter: receives the progress.
        name: what the progress calls the set of examples.
        teacher: the teacher's hidden states of the examples in their order, if they are known, in one tensor or more.

    Returns:
        The distances, by the same keys.
    """
    head, names = head_of(model), {key: label[0].upper() + label[1:] for key, label in STUDENT_NAMES.items()}
    own = ranks.share([example.length for example in examples])
    chosen = [examples[index] for index in own]
    if teacher is None:
        teacher = hidden_states(model, context, chosen, reporter, f"Full context, {name} queries")
    elif ranks.world() > 1:
        by_example = torch.cat(list(teacher)).split([example.targets for example in examples])
        teacher = [by_example[index] for index in own]
    hidden = {}
    for student, prefix in students.items():
        label = f"{names.get(student, student)}, {name} queries"
        hidden[student] = _rows(hidden_states(model, prefix, chosen, reporter, label), head)
    found = token_distances(head, hidden, _rows(teacher, head))
    return found if ranks.world() == 1 else _of_all_ranks(found, [example.targets for example in examples], own)


def _rows(states: Sequence[Tensor], head: Head) -> Tensor:
    """`[n, d]`: the hidden states of examples, of which there may be none."""
    return torch.cat(list(states)) if states else head.weight.new_empty(0, head.weight.shape[1])


def _of_all_ranks(
    own: Mapping[str, TokenDistances], tokens: Sequence[int], numbers: Sequence[int]
) -> dict[str, TokenDistances]:
    """The distances at the tokens of all examples, from those of the examples that this rank has measured."""
    place = torch.arange(sum(tokens)).split(list(tokens))
    mine = torch.cat([place[number] for number in numbers]) if numbers else torch.arange(0)
    every = {name: torch.zeros(4, sum(tokens)) for name in own}
    for name, of_student in own.items():
        parts = (of_student.kl, of_student.agrees, of_student.entropy, of_student.teacher_entropy)
        every[name][:, mine] = torch.stack([part.float() for part in parts])
    ranks.sum_(list(every.values()))  # zeros of the others: exact
    return {
        name: TokenDistances(kl, agrees > 0, own, of_teacher) for name, (kl, agrees, own, of_teacher) in every.items()
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
    """Raise SoftPromptError if the model answers the queries nearly the same without the context, or with logits that
    are not finite."""
    if math.isnan(kl_none):
        raise SoftPromptError(
            "dtype: the KL without context is not a number, because logits are not finite; accepted is a dtype with "
            "room for them: load the model in bfloat16 or float32"
        )
    if not kl_none > NEGLIGIBLE_KL:
        raise SoftPromptError(
            f"queries: the KL without context is {kl_none:.2g} nats per token, so the context does not matter for "
            f"these queries; accepted is more than {NEGLIGIBLE_KL:g}"
        )
