"""From the hidden states of student and teacher to their logits over T, and back with the gradient.

Constant factors (logit_scale, the temperature, the divisor of a softcap) are multiplied into the hidden states before
the GEMM and into their gradient after it. There they cost [n, d] instead of [n, V].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt_kernels.kernels.host.gemm import Gemm
from softprompt_kernels.kernels.problems.loss import Head, HeadProblem


@dataclass(frozen=True)
class Activation:
    """Turns the GEMM's result [n, V] into logits over T: adds `bias`, then softcap · tanh where there is a softcap."""

    bias: Tensor | None  # [V]
    softcap: float | None

    def part(self, columns: slice) -> "Activation":
        """The activation of some columns."""
        return Activation(None if self.bias is None else self.bias[columns], self.softcap)


class ScaledHidden:
    """Hidden states of n tokens of student and teacher, multiplied by all constant factors."""

    def __init__(self, problem: HeadProblem, tokens: slice | Tensor) -> None:
        inputs = problem.student[tokens], problem.teacher[tokens]
        self.count = inputs[0].shape[0]
        if problem.teacher_head is problem.head:
            stacked = inputs[0].new_empty(2 * self.count, inputs[0].shape[1], dtype=problem.compute_dtype)
            self._per_head = [stacked]
            scaled = [stacked[: self.count], stacked[self.count :]]
        else:
            self._per_head = scaled = [h.new_empty(h.shape, dtype=problem.compute_dtype) for h in inputs]
        for out, hidden, head in zip(scaled, inputs, (problem.head, problem.teacher_head), strict=True):
            out.copy_(hidden)
            if (scale := _scale(head, problem)) != 1:
                out.mul_(scale)

    def multiply(self, out: Tensor, weights: Sequence[Tensor], gemm: Gemm) -> None:
        """out [2 n, columns]: the student's h Wᵀ, then the teacher's. A shared head is one GEMM, which reads W once."""
        parts = out.chunk(len(self._per_head))
        for part, hidden, weight in zip(parts, self._per_head, weights, strict=True):
            gemm.multiply(part, hidden, weight.mT, False)


def weights_of(problem: HeadProblem) -> list[Tensor]:
    """The weight of a shared head, or the student's and the teacher's."""
    heads = [problem.head] if problem.teacher_head is problem.head else [problem.head, problem.teacher_head]
    return [head.weight for head in heads]


def activations(problem: HeadProblem) -> tuple[Activation, Activation]:
    """Those of student and teacher."""
    student = _activation(problem.head, problem)
    same = problem.teacher_head is problem.head
    return student, student if same else _activation(problem.teacher_head, problem)


def gradient_factor(problem: HeadProblem) -> float:
    """The constant factor of ∂ loss / ∂ hidden: T² of the loss times logit_scale / T of the logits."""
    return problem.head.logit_scale * problem.divergence.temperature


def _scale(head: Head, problem: HeadProblem) -> float:
    """The factor of W h: logit_scale over the softcap if there is one, else over the temperature."""
    return head.logit_scale / (head.softcap or problem.divergence.temperature)


def _activation(head: Head, problem: HeadProblem) -> Activation:
    dtype, softcap = problem.compute_dtype, head.softcap
    bias = None if head.bias is None else (head.bias.to(dtype) * _scale(head, problem)).contiguous()
    return Activation(bias, None if softcap is None else softcap / problem.divergence.temperature)
