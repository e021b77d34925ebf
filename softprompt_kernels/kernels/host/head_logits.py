"""From the hidden states of two sides to their logits over T, and how their gradient goes back.

Constant factors (logit_scale, the temperature, a softcap's divisor) are put into hidden states before and after the
products, where they cost [n, d].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from softprompt_kernels.kernels.host.gemm import Products
from softprompt_kernels.kernels.problems.loss import Head, HeadProblem


@dataclass(frozen=True)
class Activation:
    """What makes logits over T of products [n, V]: plus `bias`, then softcap · tanh where there is a softcap."""

    bias: Tensor | None  # [V]
    softcap: float | None

    def part(self, columns: slice) -> "Activation":
        """That of some of the columns."""
        return Activation(None if self.bias is None else self.bias[columns], self.softcap)


class ScaledHidden:
    """Hidden states of n tokens of both sides, with all that is constant multiplied in."""

    def __init__(self, problem: HeadProblem, tokens: slice | Tensor) -> None:
        sides = problem.student[tokens], problem.teacher[tokens]
        self.count = sides[0].shape[0]
        if problem.teacher_head is problem.head:
            stacked = sides[0].new_empty(2 * self.count, sides[0].shape[1], dtype=problem.compute_dtype)
            self._of_head = [stacked]
            scaled = [stacked[: self.count], stacked[self.count :]]
        else:
            self._of_head = scaled = [h.new_empty(h.shape, dtype=problem.compute_dtype) for h in sides]
        for out, hidden, head in zip(scaled, sides, (problem.head, problem.teacher_head), strict=True):
            out.copy_(hidden)
            if (scale := _scale(head, problem)) != 1:
                out.mul_(scale)

    def multiply(self, out: Tensor, weights: Sequence[Tensor], products: Products) -> None:
        """out [2 n, columns] = the student's products over the teacher's, in one that reads a shared weight once."""
        parts = out.chunk(len(self._of_head))
        for part, hidden, weight in zip(parts, self._of_head, weights, strict=True):
            products.multiply(part, hidden, weight.mT, False)


def weights_of(problem: HeadProblem) -> list[Tensor]:
    """The weight of a shared head, or the student's and the teacher's."""
    heads = [problem.head] if problem.teacher_head is problem.head else [problem.head, problem.teacher_head]
    return [head.weight for head in heads]


def activations(problem: HeadProblem) -> tuple[Activation, Activation]:
    """Of student and teacher."""
    student = _activation(problem.head, problem)
    same = problem.teacher_head is problem.head
    return student, student if same else _activation(problem.teacher_head, problem)


def gradient_factor(problem: HeadProblem) -> float:
    """What is left of ∂ loss / ∂ hidden beside the products: T² from the loss, logit_scale / T from the logits."""
    return problem.head.logit_scale * problem.divergence.temperature


def _scale(head: Head, problem: HeadProblem) -> float:
    """Of the products: logit_scale over the softcap if there is one, else over the temperature."""
    return head.logit_scale / (head.softcap or problem.divergence.temperature)


def _activation(head: Head, problem: HeadProblem) -> Activation:
    dtype, softcap = problem.compute_dtype, head.softcap
    bias = None if head.bias is None else (head.bias.to(dtype) * _scale(head, problem)).contiguous()
    return Activation(bias, None if softcap is None else softcap / problem.divergence.temperature)
