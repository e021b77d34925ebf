"""What every loss kernel is given: frozen records, already checked by the ops.

Notation used by all loss kernels:

    N  tokens      V  vocabulary rows that count (`valid_vocab` cuts the rest)      d  size of a hidden state
    z_s, z_t       logits of student and teacher, divided by the temperature T
    p_s, p_t       their softmax

A head maps a hidden state to logits, `softcap(logit_scale · (W h + bias))`. Every loss is multiplied by T², so that
its gradient has the same size at every temperature. Rows of weight 0 are skipped: whatever they hold, their loss and
gradient are 0. The other weights are not applied by the kernels, but by the caller.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import accumulate_dtype

FORWARD, REVERSE, JSD = "forward", "reverse", "jsd"

DIVERGENCES = {FORWARD: 0, REVERSE: 1, JSD: 2}
"""Every kind of divergence, with its number in `csrc/tensor.h`. A kind that is not here raises wherever it is used."""


def unknown_divergence(kind: str) -> ValueError:
    """The error of a kind that is not in DIVERGENCES, or that a kernel has no code for."""
    return ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {kind!r}")


@dataclass(frozen=True)
class Divergence:
    """Which divergence of teacher t and student s, and at which temperature.

    forward KL(t‖s), reverse KL(s‖t), jsd β KL(t‖m) + (1−β) KL(s‖m) with m = β t + (1−β) s
    """

    kind: str  # one of DIVERGENCES
    beta: float
    temperature: float

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise unknown_divergence(self.kind)

    @property
    def code(self) -> int:
        """The kind's number in C++."""
        return DIVERGENCES[self.kind]


@dataclass(frozen=True)
class Head:
    """A language-model head."""

    weight: Tensor  # [V or more, d]
    bias: Tensor | None  # [V or more]
    softcap: float | None
    logit_scale: float

    def cut(self, vocab: int) -> "Head":
        """The head of the first `vocab` rows."""
        bias = None if self.bias is None else self.bias[:vocab]
        return Head(self.weight[:vocab], bias, self.softcap, self.logit_scale)


@dataclass(frozen=True)
class LogitsProblem:
    """A divergence between given logits."""

    student: Tensor  # [N, V or more]
    teacher: Tensor  # [N, V or more]
    weights: Tensor | None  # [N], None: all 1
    divergence: Divergence
    vocab: int

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 students, fp32 for all others."""
        return accumulate_dtype(self.student.dtype)


@dataclass(frozen=True)
class HeadProblem:
    """A divergence between the heads' logits of hidden states."""

    student: Tensor  # [N, d]
    teacher: Tensor  # [N, d of the teacher]
    head: Head
    teacher_head: Head
    weights: Tensor | None  # [N], None: all 1
    divergence: Divergence
    chunk_tokens: int | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 students, fp32 for all others."""
        return accumulate_dtype(self.student.dtype)


@dataclass(frozen=True)
class ExpectationProblem:
    """What p(v) ∝ exp(z_v), z = logit_scale · (W h + bias) / T, expects of W and bias (no softcap)."""

    hidden: Tensor  # [N, d]
    head: Head
    labels: Tensor | None  # [N] int64, negative: none
    weights: Tensor | None  # [N], None: all 1
    temperature: float
    chunk_tokens: int | None
    need_mean: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 hidden states, fp32 for all others."""
        return accumulate_dtype(self.hidden.dtype)


def no_statistics(loss: Tensor) -> Tensor:
    """[N, 0]: what the forward of a kernel leaves to its backward that computes all of it again."""
    return loss.new_empty(loss.shape[0], 0)


class HeadNeeds(NamedTuple):
    """Which gradients of a head problem are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients(NamedTuple):
    """The gradients of `HeadNeeds`, None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Expectation(NamedTuple):
    """Row by row, in the dtype of the computation; anything finite in skipped rows."""

    log_partition: Tensor  # [N] lse(z), may be float64
    label_logit: Tensor | None  # [N] z of the label, 0 where there is none
    mean: Tensor | None  # [N, d] E_p[W]
    bias_mean: Tensor | None  # [N] E_p[bias]


@dataclass(frozen=True)
class ExpectationState:
    """The online softmax of the n tokens of a chunk, after some tiles of the vocabulary."""

    largest: Tensor  # [n] m
    total: Tensor  # [n] float64, Σ e
    mean: Tensor | None  # [n, d] Σ e W
    bias_total: Tensor | None  # [n] float64, Σ e · bias
    labels: Tensor | None  # [n]
    label_logit: Tensor | None  # [n]
