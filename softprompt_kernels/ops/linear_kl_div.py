"""Divergence of a student from a teacher, from hidden states and the weight of a language-model head.

The logits, softcap(logit_scale · (W h + bias)), are computed chunk by chunk and never exist all at once. Cost, in units
of one GEMM of the head's size, U = 2·N·V·d FLOP:

    frozen head     3U   the forward computes both logits and the student's gradient; the backward scales its rows
    trained head    2U forward, 4U backward: both logits again, gradients of the hidden states and of the weight
    no gradient     2U

The teacher is a constant: its logits give no gradient to its hidden states or to the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import accumulate_dtype
from softprompt_kernels.kernels.problems.loss import Divergence, Head, HeadNeeds, HeadProblem
from softprompt_kernels.kernels.sharded.shards import refusals_shared
from softprompt_kernels.ops import checks, dispatch, sharded
from softprompt_kernels.ops.autograd import forbid_double_backward, row_gradient_dtype, run_kernel, scale_rows
from softprompt_kernels.ops.kl_div import check_divergence
from softprompt_kernels.ops.reduction import check_reduction, check_weights, reduce_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "linear_kl_div"


def linear_kl_div(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    valid_vocab: int | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Divergence between the distributions of two language-model heads.

    Formulas and gradients: docs/maths.md, "The divergences and their gradients". The logits exist for one chunk of
    tokens at a time. Cost with a frozen head: 3 GEMMs of its size, forward and backward together.

    Args:
        student_hidden: [N, d]; more leading dimensions are flattened. Differentiable.
        teacher_hidden: [N, d of the teacher]; a constant, any floating dtype.
        weight: [V, d], student_hidden's dtype; differentiable, and costs nothing where it needs no gradient.
        teacher_weight: [V, d of the teacher]; a constant. None: `weight`.
        bias: [V], added to W h of student and teacher; differentiable, through the student's logits.
        softcap: all logits become softcap · tanh(logits / softcap), after logit_scale.
        logit_scale: multiplies all logits.
        divergence, beta, temperature, weights, reduction, backend: as in `kl_div`.
        valid_vocab: only the first `valid_vocab` rows of weight, teacher_weight and bias count.
        chunk_tokens: tokens per chunk, whose logits exist at a time. None: as many as fit the workspace.
        group: the ranks over which the vocabulary is split (`ops/sharded.py`). Each gives its rows of weight,
            teacher_weight and bias, and the same hidden states, and gets the whole loss and gradient; valid_vocab
            counts the entries of all ranks. The backend is then None or "composed".

    Returns:
        The loss in fp32 (float64 for float64 students): a scalar, or [N] with reduction "none".

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it accepts; with a group on all ranks.
        RuntimeError: on a second derivative, or when the weight was changed in place before the backward.
    """
    with refusals_shared(group, student_hidden):
        student_hidden, weight = checks.autocast(student_hidden, weight)
        checks.hidden_and_weight("student_hidden", student_hidden, "weight", weight)
        checks.same_dtype_and_device("weight", weight, "student_hidden", student_hidden)
        if teacher_weight is None:
            checks.hidden_and_weight("teacher_hidden", teacher_hidden, "weight", weight)
        else:
            checks.hidden_and_weight("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight)
            checks.device("teacher_weight", teacher_weight, student_hidden.device)
            if (valid_vocab is None or group is not None) and teacher_weight.shape[0] != weight.shape[0]:
                raise ValueError(
                    f"valid_vocab must be given where the heads have different vocabularies, and group be None; got "
                    f"{valid_vocab} with {weight.shape[0]} rows of weight and {teacher_weight.shape[0]} of "
                    f"teacher_weight"
                )
        checks.device("teacher_hidden", teacher_hidden, student_hidden.device)
        checks.same_rows("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
        checks.head_options(weight, bias, logit_scale, chunk_tokens)
        checks.positive("softcap", softcap)
        check_divergence(divergence, beta, temperature)
        check_reduction(reduction)
        teacher_rows = (weight if teacher_weight is None else teacher_weight).shape[0]
        vocab = 0 if group is not None else checks.vocabulary(valid_vocab, weight.shape[0], teacher_rows)
        student, teacher = student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
        weights = check_weights(weights, student.shape[0], accumulate_dtype(student.dtype), student.device)
        dispatch.check_backend(backend)
        logit_scale, beta, temperature = float(logit_scale), float(beta), float(temperature)
        if group is not None:
            checks.whole("valid_vocab", valid_vocab)
            sharded.check_backend(backend)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if group is not None:
        call = sharded.LiveCall(softcap, logit_scale, divergence, beta, temperature, valid_vocab, chunk_tokens)
        heads = None if teacher_weight is None else teacher_weight.detach()
        rows = sharded.linear_kl_div(student, weight, bias, teacher, heads, weights, call, group)
        return reduce_rows(rows, weights, reduction)
    rows, _ = forward_op(
        student,
        weight,
        bias,
        teacher,
        None if teacher_weight is None else teacher_weight.detach(),
        weights,
        torch.is_grad_enabled() and student.requires_grad and not head_trains,
        softcap,
        logit_scale,
        divergence,
        beta,
        temperature,
        vocab,
        chunk_tokens,
        backend,
    )
    return reduce_rows(rows, weights, reduction)


def _problem(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    weights: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    chunk_tokens: int | None,
) -> HeadProblem:
    head = Head(weight, bias, softcap, logit_scale).cut(vocab)
    teacher_head = head
    if teacher_weight is not None:
        teacher_head = Head(teacher_weight[:vocab], head.bias, softcap, logit_scale)
    return HeadProblem(
        student, teacher, head, teacher_head, weights, Divergence(divergence, beta, temperature), chunk_tokens
    )


@torch.library.custom_op("softprompt_kernels::linear_kl_div", mutates_args=())
def forward_op(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    weights: Tensor | None,
    need_gradient: bool,
    softcap: float | None,
    logit_scale: float,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    chunk_tokens: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem = _problem(
        student,
        weight,
        bias,
        teacher,
        teacher_weight,
        weights,
        softcap,
        logit_scale,
        divergence,
        beta,
        temperature,
        vocab,
        chunk_tokens,
    )
    kernel = dispatch.select(OP, problem, backend, student.device)
    rows, gradient = run_kernel(f"{OP}.forward", kernel, student.device, kernel.forward, problem, need_gradient)
    dtype = row_gradient_dtype(student.dtype)
    return rows, student.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)


@forward_op.register_fake
def _(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    weights: Tensor | None,
    need_gradient: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    rows = student.new_empty(student.shape[0], dtype=accumulate_dtype(student.dtype))
    return rows, student.new_empty(student.shape if need_gradient else 0, dtype=row_gradient_dtype(student.dtype))


@torch.library.custom_op("softprompt_kernels::linear_kl_div_backward", mutates_args=())
def backward_op(
    row_scale: Tensor,
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    weights: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    divergence: str,
    beta: float,
    temperature: float,
    vocab: int,
    chunk_tokens: int | None,
    backend: str | None,
    needs: list[bool],
) -> list[Tensor]:
    problem = _problem(
        student,
        weight,
        bias,
        teacher,
        teacher_weight,
        weights,
        softcap,
        logit_scale,
        divergence,
        beta,
        temperature,
        vocab,
        chunk_tokens,
    )
    kernel = dispatch.select(OP, problem, backend, student.device)
    arguments = problem, row_scale, HeadNeeds(*needs)
    by_input = run_kernel(f"{OP}.backward", kernel, student.device, kernel.backward, *arguments)
    gradients = []
    if needs[0]:
        gradients.append(by_input.hidden.contiguous())
    for gradient, tensor, need in ((by_input.weight, weight, needs[1]), (by_input.bias, bias, needs[2])):
        if need and tensor is not None:
            padded = tensor.new_zeros(tensor.shape)  # vocabulary entries that are cut have gradient 0
            padded[:vocab] = gradient
            gradients.append(padded)
    return gradients


@backward_op.register_fake
def _(row_scale: Tensor, student: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> list[Tensor]:
    needs = others[-1]
    inputs = zip((student, weight, bias), needs, strict=True)
    return [t.new_empty(t.shape) for t, need in inputs if need and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, weight, bias, *constants = inputs[:6]
    ctx.mark_non_differentiable(output[1])
    ctx.stored = inputs[6]
    ctx.options = inputs[7:]
    # With a stored gradient, the weight is saved only so that changing it in place before the backward is an error, as
    # for a linear layer.
    ctx.save_for_backward(*((output[1], student, weight) if ctx.stored else (student, weight, bias, *constants)))


def _backward(ctx: Any, grad_rows: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * 15
    needs = list(ctx.needs_input_grad[:3])
    if ctx.stored:
        stored, student, _weight = ctx.saved_tensors
        gradients[0] = scale_rows(stored, grad_rows, student, OP)
        return tuple(gradients)
    computed = iter(backward_op(grad_rows, *ctx.saved_tensors, *ctx.options, needs))
    for slot, need in enumerate(needs):
        if need:
            gradients[slot] = next(computed)
    return tuple(gradients)


forward_op.register_autograd(_backward, setup_context=_setup_context)
forbid_double_backward(backward_op, OP)
