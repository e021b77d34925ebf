"""The problems that the loss kernels are given. The ops have checked their arguments.

Notation of all loss kernels:

    N  tokens      V  vocabulary entries that count (`valid_vocab` cuts the rest)      d  size of a hidden state
    z_s, z_t       logits of student and teacher, divided by the temperature T
    p_s, p_t       their softmax

A head maps a hidden state to logits, `softcap(logit_scale · (W h + bias))`. Every loss is multiplied by T², so that
its gradient has the same size at every temperature. Kernels skip rows of weight 0: their loss and gradient are 0,
whatever they hold. The caller applies all other weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import accumulate_dtype

FORWARD, REVERSE, JSD = "forward", "reverse", "jsd"

DIVERGENCES = {FORWARD: 0, REVERSE: 1, JSD: 2}
"""Every kind of divergence, with its number in `csrc/tensor.h`. Every use of a kind that is not here raises."""


def unknown_divergence(kind: str) -> ValueError:
    """The error for a kind that is not in DIVERGENCES, or that a kernel does not implement."""
    return ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {kind!r}")


@dataclass(frozen=True)
class Divergence:
    """A divergence of teacher t and student s at a temperature.

    forward KL(t‖s), reverse KL(s‖t), jsd β KL(t‖m) + (1−β) KL(s‖m) with m = β t + (1−β) s

    Raises:
        ValueError: the kind is not in DIVERGENCES.
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
        """The head of the first `vocab` vocabulary entries."""
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
    """Expectations of W and bias under p(v) ∝ exp(z_v), with z = logit_scale · (W h + bias) / T (no softcap)."""

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
    """Row statistics [N, 0] of a forward whose backward computes everything again."""
    return loss.new_empty(loss.shape[0], 0)


class HeadNeeds(NamedTuple):
    """Which gradients of a head problem the backward has to compute."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients(NamedTuple):
    """The gradients that `HeadNeeds` asked for, None for the others."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Expectation(NamedTuple):
    """Results per row, in the compute dtype. Skipped rows may hold any finite number."""

    log_partition: Tensor  # [N] lse(z), possibly in float64
    label_logit: Tensor | None  # [N] z of the label, 0 for rows without one
    mean: Tensor | None  # [N, d] E_p[W]
    bias_mean: Tensor | None  # [N] E_p[bias]


@dataclass(frozen=True)
class ExpectationState:
    """The online softmax of the n tokens of a chunk, after some tiles of the vocabulary; e = exp(z − m)."""

    row_max: Tensor  # [n] m, the largest z of the tiles
    row_sum: Tensor  # [n] float64, Σ e
    mean: Tensor | None  # [n, d] Σ e W
    bias_sum: Tensor | None  # [n] float64, Σ e · bias
    labels: Tensor | None  # [n]
    label_logit: Tensor | None  # [n]
