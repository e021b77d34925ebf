"""Divergence between the logits of two heads, from hidden states: the definition. Memory is O(N · V)."""

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.loss import Head, HeadGradients, HeadNeeds, HeadProblem
from softprompt_kernels.kernels.reference import divergence


def unsupported(problem: HeadProblem) -> str | None:
    """The reference serves every problem."""
    return None


def forward(problem: HeadProblem, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed, in the compute dtype."""
    loss, by_linear = _rows(problem)
    if not need_gradient:
        return loss, None
    return loss, by_linear @ problem.head.weight.to(by_linear.dtype)


def backward(problem: HeadProblem, row_scale: Tensor, needs: HeadNeeds) -> HeadGradients:
    """Gradients of Σ_n row_scale[n] · loss[n], by hidden states, weight and bias, each in its input's dtype."""
    _, by_linear = _rows(problem)
    by_linear = by_linear * row_scale[:, None].to(by_linear.dtype)
    head, dtype = problem.head, by_linear.dtype
    hidden = by_linear @ head.weight.to(dtype) if needs.hidden else None
    weight = by_linear.mT @ kept_rows(problem.student, problem.weights).to(dtype) if needs.weight else None
    bias = by_linear.sum(0) if needs.bias else None
    return HeadGradients(
        None if hidden is None else hidden.to(problem.student.dtype),
        None if weight is None else weight.to(head.weight.dtype),
        None if bias is None or head.bias is None else bias.to(head.bias.dtype),
    )


def logits(hidden: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor | float]:
    """Logits over T [N, V], and their derivative by W h + bias: [N, V] with a softcap, else one number."""
    raw = hidden @ head.weight.to(hidden.dtype).mT
    if head.bias is not None:
        raw = raw + head.bias.to(hidden.dtype)
    slope = head.logit_scale / temperature
    if head.softcap is None:
        return raw * slope, slope
    capped = torch.tanh(raw * (head.logit_scale / head.softcap))
    return capped * (head.softcap / temperature), slope * (1 - capped.square())


def _rows(problem: HeadProblem) -> tuple[Tensor, Tensor]:
    """Loss [N] and its derivative by W h + bias [N, V]."""
    temperature, dtype = problem.divergence.temperature, problem.compute_dtype
    student, slope = logits(kept_rows(problem.student, problem.weights).to(dtype), problem.head, temperature)
    teacher, _ = logits(kept_rows(problem.teacher, problem.weights).to(dtype), problem.teacher_head, temperature)
    loss, gradient = divergence.rows(student, teacher, problem.divergence)
    loss, gradient = loss * temperature**2, gradient * slope * temperature**2
    if problem.weights is not None:
        loss = torch.where(problem.weights == 0, 0, loss)
        gradient = torch.where(problem.weights[:, None] == 0, 0, gradient)
    return loss, gradient


def kept_rows(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """The hidden states, with 0 in skipped rows, whose contents would spread through a GEMM."""
    return hidden if weights is None else torch.where(weights[:, None] == 0, 0, hidden)
