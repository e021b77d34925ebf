"""The losses of a head whose rows are split over the ranks of a process group: vocabulary parallelism.

Each rank calls the op with its rows of the weight and the bias, consecutive and in the order of the ranks, and with the
same hidden states, teacher and labels. Shards may differ in size. Every rank gets the whole loss, and the whole
gradient of the hidden states: it must not be summed over this group. The gradient of a trained head is that of the
rank's rows.

Collectives of a call, in bytes for fp32:

| op | gathers, a rank | sums |
|---|---|---|
| all | 2 KiB: what the rank was given (`kernels/sharded/shards.py`); the host waits for it | |
| `teacher_moments` | 16 N | 4 N d, with a bias 4 N (d + 1) |
| `linear_kl_div_from_moments` | 16 N | 4 N d, with a bias 4 N (d + 1); none without a gradient |
| `linear_kl_div` | 32 n for each chunk of n tokens | 4 N (d + 1), without a gradient 4 N |
| the same, reverse and jsd | 32 n | these, and 16 n for each chunk |

The backward of a frozen head needs none; that of a trained one those of the forward again.

These are `autograd.Function`s that are not registered with torch.library, because a process group is no argument of an
op there. Under torch.compile they break the graph, so `fullgraph=True` refuses them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_kernels.kernels import moments
from softprompt_kernels.kernels.composed import linear_kl_div as composed
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationProblem, Head, HeadNeeds, HeadProblem
from softprompt_kernels.kernels.sharded import divergence as sharded_divergence
from softprompt_kernels.kernels.sharded import expectation as sharded_expectation
from softprompt_kernels.kernels.sharded.shards import Shards, agree, refusals_shared
from softprompt_kernels.ops import dispatch
from softprompt_kernels.ops.autograd import NO_SECOND_DERIVATIVE, row_gradient_dtype, run_kernel, scale_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_COMPOSED = "composed"


def check_backend(backend: str | None) -> None:
    """Raises ValueError unless the call names no backend, or the only one that knows groups."""
    requested = backend or os.environ.get("SOFTPROMPT_BACKEND") or None
    if requested not in (None, _COMPOSED):
        raise ValueError(f"backend must be None or {_COMPOSED!r} with a group; got {requested!r}")


# --- from moments -----------------------------------------------------------------------------------------------------


def teacher_moments(
    hidden: Tensor,
    head: Head,
    temperature: float,
    valid_vocab: int | None,
    chunk_tokens: int | None,
    backend: str | None,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mean [N, d], entropy [N] and bias_mean [N] of the whole vocabulary, from this rank's rows of the head."""
    op = "teacher_moments"
    with refusals_shared(group, hidden):
        kernel = _expectation_kernel(op, head, hidden, temperature, chunk_tokens, backend)
    facts = _facts("teacher_hidden", hidden, head, {"temperature": temperature})
    shards = agree(group, hidden.device, head.weight.shape[0], valid_vocab, facts)
    head = head.cut(shards.size)
    expectation = partial(sharded_expectation.forward, shards=shards, kernel=kernel.forward)
    arguments = hidden, head, temperature, chunk_tokens, expectation
    found: tuple[Tensor, Tensor, Tensor | None] = run_kernel(
        f"{op}.forward", kernel, hidden.device, moments.teacher_moments, *arguments
    )
    return found


def linear_kl_div_from_moments(
    problem: moments.MomentsProblem,
    valid_vocab: int | None,
    made_with: int | None,
    check_vocabulary: Callable[[int, int], None] | None,
    backend: str | None,
    group: ProcessGroup,
) -> Tensor:
    """Loss of each row [N] of the whole vocabulary, differentiable by problem.student.

    Args:
        problem: with this rank's rows of the head.
        valid_vocab: entries of all ranks that count.
        made_with: valid_vocab of the moments.
        check_vocabulary: raises unless the moments were made with (entries that count, entries of all ranks).
        backend: of the kernel for a shard.
        group: the ranks.
    """
    student, head, op = problem.student, problem.head, "linear_kl_div_from_moments"
    with refusals_shared(group, student):
        kernel = _expectation_kernel(op, head, student, problem.temperature, problem.chunk_tokens, backend)
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    facts = _facts(
        "student_hidden",
        student,
        head,
        {
            "temperature": problem.temperature,
            "label_weight": problem.label_weight,
            "moments": "None" if problem.mean is None else "given",
            "valid_vocab of the moments": made_with,
            "the largest label": _largest(problem.labels),
            "rows of weights above 0": _kept(problem.weights),
            "a gradient by student_hidden": need_gradient,
        },
    )
    shards = agree(group, student.device, head.weight.shape[0], valid_vocab, facts)
    if check_vocabulary is not None:
        check_vocabulary(shards.total, shards.rows)
    problem = replace(problem, head=head.cut(shards.size))
    rows: Tensor = _FromMoments.apply(student, head.weight, problem, need_gradient, shards, kernel)
    return rows


class _FromMoments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        problem: moments.MomentsProblem,
        need_gradient: bool,
        shards: Shards,
        kernel: Any,
    ) -> Tensor:
        problem = replace(problem, student=student)
        expectation = partial(
            sharded_expectation.forward, shards=shards, kernel=kernel.forward, label_weight=problem.label_weight
        )
        arguments = problem, need_gradient, expectation, True
        name = "linear_kl_div_from_moments.forward"
        rows, gradient = run_kernel(name, kernel, student.device, moments.forward, *arguments)
        if gradient is not None:
            # The weight is saved only so that changing it in place before the backward is an error.
            ctx.save_for_backward(gradient.to(row_gradient_dtype(student.dtype)), student, weight)
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        stored, student, _ = ctx.saved_tensors
        return scale_rows(stored, grad_outputs[0], student, "linear_kl_div_from_moments"), *[None] * 5


# --- with a live teacher ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LiveCall:
    """The options of a call of `linear_kl_div`."""

    softcap: float | None
    logit_scale: float
    divergence: str
    beta: float
    temperature: float
    valid_vocab: int | None
    chunk_tokens: int | None


def linear_kl_div(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    weights: Tensor | None,
    call: LiveCall,
    group: ProcessGroup,
) -> Tensor:
    """Loss of each row [N] of the whole vocabulary, differentiable by student, weight and bias."""
    needs = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in (student, weight, bias)]
    facts = _facts(
        "student_hidden",
        student,
        Head(weight, bias, None, call.logit_scale),
        {
            "teacher_hidden's size and dtype": f"{teacher.shape[1]} {_dtype(teacher)}",
            "teacher_weight": "None" if teacher_weight is None else _dtype(teacher_weight),
            "divergence": call.divergence,
            "beta": call.beta,
            "temperature": call.temperature,
            "softcap": call.softcap,
            "chunk_tokens": call.chunk_tokens,
            "rows of weights above 0": _kept(weights),
            "gradients by student_hidden, and by weight or bias": f"{needs[0]} {any(needs[1:])}",
        },
    )
    shards = agree(group, student.device, weight.shape[0], call.valid_vocab, facts)
    rows: Tensor = _Live.apply(student, weight, bias, teacher, teacher_weight, weights, call, shards, needs)
    return rows


class _Live(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor | None,
        weights: Tensor | None,
        call: LiveCall,
        shards: Shards,
        needs: list[bool],
    ) -> Tensor:
        ctx.call, ctx.shards = call, shards
        ctx.stored = needs[0] and not any(needs[1:])
        problem = _problem(student, weight, bias, teacher, teacher_weight, weights, call, shards)
        arguments = problem, shards, ctx.stored
        name = "linear_kl_div.forward"
        rows, gradient = run_kernel(name, composed, student.device, sharded_divergence.forward, *arguments)
        if gradient is not None:
            ctx.save_for_backward(gradient.to(row_gradient_dtype(student.dtype)), student, weight)
        elif any(needs):
            ctx.save_for_backward(student, weight, bias, teacher, teacher_weight, weights)
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if ctx.stored:
            stored, student, _ = ctx.saved_tensors
            return scale_rows(stored, grad_outputs[0], student, "linear_kl_div"), *[None] * 8
        inputs = ctx.saved_tensors
        gradients = _LiveBackward.apply(grad_outputs[0], *inputs, ctx.call, ctx.shards, ctx.needs_input_grad[:3])
        found = iter(gradients)
        return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), *[None] * 6


class _LiveBackward(torch.autograd.Function):
    """The gradients of a trained head, and of the hidden states before it; without a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, row_scale: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        student, weight, bias, teacher, teacher_weight, weights, call, shards, needs = inputs
        problem = _problem(student, weight, bias, teacher, teacher_weight, weights, call, shards)
        arguments = problem, shards, row_scale, HeadNeeds(*needs)
        name = "linear_kl_div.backward"
        found = run_kernel(name, composed, student.device, sharded_divergence.backward, *arguments)
        gradients = [found.hidden] if needs[0] else []
        for gradient, tensor, need in ((found.weight, weight, needs[1]), (found.bias, bias, needs[2])):
            if need:
                padded = torch.zeros_like(tensor)  # entries that are cut have gradient 0
                padded[: shards.size] = gradient
                gradients.append(padded)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE.format("linear_kl_div"))


def _problem(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    weights: Tensor | None,
    call: LiveCall,
    shards: Shards,
) -> HeadProblem:
    head = Head(weight, bias, call.softcap, call.logit_scale).cut(shards.size)
    teacher_head = head if teacher_weight is None else replace(head, weight=teacher_weight[: shards.size])
    divergence = Divergence(call.divergence, call.beta, call.temperature)
    return HeadProblem(student, teacher, head, teacher_head, weights, divergence, call.chunk_tokens)


# --- parts of both ----------------------------------------------------------------------------------------------------


def _facts(name: str, hidden: Tensor, head: Head, others: dict[str, object]) -> dict[str, object]:
    """What the ranks must have the same."""
    return {
        f"the shape of {name}": list(hidden.shape),
        f"the dtype of {name}": _dtype(hidden),
        "bias": "None" if head.bias is None else "given",
        "logit_scale": head.logit_scale,
        **others,
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _largest(labels: Tensor | None) -> str:
    """The largest label, where the host need not wait to know it."""
    if labels is None:
        return "None"
    return str(labels.max().item()) if labels.device.type == "cpu" and labels.numel() else "given"


def _kept(weights: Tensor | None) -> int | None:
    """Rows that are not skipped; None where the host would wait to know."""
    return int(weights.count_nonzero()) if weights is not None and weights.device.type == "cpu" else None


def _expectation_kernel(
    op: str, head: Head, hidden: Tensor, temperature: float, chunk_tokens: int | None, backend: str | None
) -> Any:
    problem = ExpectationProblem(hidden, head, None, None, temperature, chunk_tokens, need_mean=True)
    return dispatch.select(op, problem, backend, hidden.device)
