"""Divergence of a student's logits from a teacher's.

    forward  KL(p_t‖p_s)      reverse  KL(p_s‖p_t)      jsd  β KL(p_t‖m) + (1−β) KL(p_s‖m),  m = β p_t + (1−β) p_s

with p = softmax(logits / T), each times T². The teacher is a constant: it gets no gradient. The backward computes the
gradient from the logits, so the gradient itself is the only tensor of size [N, V] that is allocated. A kernel keeps
`STATISTICS` numbers per row from forward to backward, such as a row's maximum and sum; with 0, its backward computes
them again.
"""

from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import accumulate_dtype
from softprompt_kernels.kernels.problems.loss import DIVERGENCES, Divergence, LogitsProblem, unknown_divergence
from softprompt_kernels.ops import checks, dispatch
from softprompt_kernels.ops.autograd import forbid_double_backward, run_kernel
from softprompt_kernels.ops.reduction import check_reduction, check_weights, reduce_rows

OP = "kl_div"
BETA_MARGIN = 1e-4  # closer to 0 or 1, the smaller part of the mixture is mostly rounding error in fp32


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    valid_vocab: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the softmax of two tensors of logits.

    Formulas and gradients: docs/maths.md, "The divergences and their gradients". "jsd" is the generalised divergence of
    GKD (arXiv 2306.13649) with β = `beta`.

    Args:
        student_logits: [N, V]; more leading dimensions are flattened. Differentiable.
        teacher_logits: [N, V]; a constant. Any floating dtype, all arithmetic is fp32 (float64 for float64 students).
        divergence: "forward" KL(t‖s), "reverse" KL(s‖t), or "jsd".
        beta: the teacher's share of the mixture of "jsd", in [1e-4, 1 - 1e-4].
        temperature: divides both logits and multiplies the loss by its square.
        weights: [N], at least 0. Rows of weight 0 are skipped: they may hold anything.
        reduction: "mean" (over the sum of weights; 0 if that is 0), "sum", or "none" (weighted rows, [N]).
        valid_vocab: only the first `valid_vocab` logits of student and teacher count; these may be padded differently.
        backend: the name of a backend; None chooses one.

    A logit of −inf is a probability of 0. In KL(p‖q), an entry with p = 0 contributes 0, and one with only q = 0 makes
    the loss +inf ("jsd" is bounded, and stays finite). A teacher row of −inf only has loss 0, and such a student row
    has loss +inf, both with gradient 0.

    Returns:
        The loss in fp32 (float64 for float64 students): a scalar, or [N] with reduction "none".

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it accepts.
        RuntimeError: on a second derivative.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        checks.floating(name, logits)
        checks.rows_and_columns(name, logits)
    checks.device("teacher_logits", teacher_logits, student_logits.device)
    checks.same_rows("teacher_logits", teacher_logits, "student_logits", student_logits)
    student, teacher = student_logits.flatten(0, -2), teacher_logits.flatten(0, -2)
    if valid_vocab is None and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"valid_vocab must be given where student and teacher have different vocabularies; got None with "
            f"{student.shape[1]} student and {teacher.shape[1]} teacher logits"
        )
    vocab = checks.vocabulary(valid_vocab, student.shape[1], teacher.shape[1])
    check_divergence(divergence, beta, temperature)
    check_reduction(reduction)
    weights = check_weights(weights, student.shape[0], accumulate_dtype(student.dtype), student.device)
    dispatch.check_backend(backend)
    options = (divergence, float(beta), float(temperature), vocab, backend)
    rows, _ = forward_op(student, teacher.detach(), weights, *options)
    return reduce_rows(rows, weights, reduction)


def check_divergence(divergence: str, beta: float, temperature: float) -> None:
    """Raises ValueError for an unknown divergence, and for beta or a temperature out of range."""
    if divergence not in DIVERGENCES:
        raise unknown_divergence(divergence)
    if not BETA_MARGIN <= beta <= 1 - BETA_MARGIN:
        raise ValueError(
            f"beta must be in [{BETA_MARGIN}, 1 - {BETA_MARGIN}] ('forward' and 'reverse' are the ends); got {beta}"
        )
    checks.positive("temperature", temperature)


@torch.library.custom_op("softprompt_kernels::kl_div", mutates_args=())
def forward_op(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem = LogitsProblem(student, teacher, weights, Divergence(divergence, beta, temperature), vocab)
    kernel = dispatch.select(OP, problem, backend, student.device)
    rows, statistics = run_kernel(f"{OP}.forward", kernel, student.device, kernel.forward, problem)
    return rows, statistics


@forward_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem = LogitsProblem(student, teacher, weights, Divergence(divergence, beta, temperature), vocab)
    kernel = dispatch.select(OP, problem, backend, student.device)  # the same kernel will run
    rows = student.new_empty(student.shape[0], dtype=accumulate_dtype(student.dtype))
    return rows, rows.new_empty(student.shape[0], kernel.STATISTICS)


@torch.library.custom_op("softprompt_kernels::kl_div_backward", mutates_args=())
def backward_op(
    row_scale: Tensor,
    statistics: Tensor,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    backend: str | None,
) -> Tensor:
    problem = LogitsProblem(student, teacher, weights, Divergence(divergence, beta, temperature), vocab)
    kernel = dispatch.select(OP, problem, backend, student.device)
    gradient: Tensor = run_kernel(
        f"{OP}.backward", kernel, student.device, kernel.backward, problem, row_scale, statistics
    )
    return gradient.contiguous()


@backward_op.register_fake
def _(row_scale: Tensor, statistics: Tensor, student: Tensor, *others: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx: Any, grad_rows: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradient = backward_op(grad_rows, *ctx.saved_tensors, *ctx.options) if ctx.needs_input_grad[0] else None
    return gradient, *[None] * 7


forward_op.register_autograd(_backward, setup_context=_setup_context)
forbid_double_backward(backward_op, OP)
