"""The forward KL from the moments of a teacher: d + 1 numbers per token instead of V logits, exact.

For a linear head, KL(p_t‖p_h) needs only two things of the teacher: m = E_{p_t}[W] and its entropy (derivation in
`kernels/moments.py`). `teacher_moments` computes them once, with 2 GEMMs of the head's size. Each step then costs 2
such GEMMs, forward and backward together. Both numbers are 3 for 16-bit heads on a GPU
(`kernels/device/head_expectation.py`). A label has moments too (W_y, entropy 0), so the NLL and mixtures with it are
the same op.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_kernels.kernels import moments as moments_kernels
from softprompt_kernels.kernels.problems.attention import accumulate_dtype
from softprompt_kernels.kernels.problems.loss import ExpectationProblem, Head
from softprompt_kernels.kernels.sharded.shards import refusals_shared
from softprompt_kernels.ops import checks, dispatch, sharded
from softprompt_kernels.ops.autograd import row_gradient_dtype, run_kernel, scale_rows
from softprompt_kernels.ops.reduction import check_reduction, check_weights, reduce_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TEACHER_OP = "teacher_moments"
STUDENT_OP = "linear_kl_div_from_moments"


@dataclass(frozen=True)
class TeacherMoments:
    """What the forward KL needs of a teacher, and the settings that it was computed with.

    Indexing selects rows: `moments[:4]` are those of the first four tokens. Derivation: docs/maths.md.

    Args:
        mean: [N, d] in fp32 (float64 for float64 teachers), E_p[W] for each token.
        entropy: [N] in the same dtype, of the teacher's distribution, in nats.
        bias_mean: [N] in the same dtype, E_p[bias]; None without a bias.
        temperature: that the logits were divided by.
        logit_scale: that the logits were multiplied by.
        valid_vocab: how many entries of the vocabulary counted; None: all.
    """

    mean: Tensor
    entropy: Tensor
    bias_mean: Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    valid_vocab: int | None = None

    def __getitem__(self, rows: Any) -> TeacherMoments:
        """The moments of some rows; `rows` is any index of the first dimension."""
        bias_mean = None if self.bias_mean is None else self.bias_mean[rows]
        return TeacherMoments(
            self.mean[rows], self.entropy[rows], bias_mean, self.temperature, self.logit_scale, self.valid_vocab
        )


def teacher_moments(
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> TeacherMoments:
    """The moments of a teacher's distribution, which are all that the forward KL needs of it. No gradient.

    Derivation: docs/maths.md, "The KL of a linear head". Cost: 2 GEMMs of the head's size (3 for 16-bit heads on a
    GPU).

    Args:
        teacher_hidden: [N, d]; more leading dimensions are flattened.
        weight: [V, d], teacher_hidden's dtype.
        bias: [V]; −inf gives an entry the probability 0.
        logit_scale: multiplies the logits.
        temperature: divides the logits.
        valid_vocab: only the first `valid_vocab` entries of weight and bias count.
        chunk_tokens: tokens per chunk, whose logits exist at a time. None: as many as fit the workspace.
        backend: the name of a backend; None chooses one.
        group: the ranks over which the vocabulary is split (`ops/sharded.py`). Each gives its rows of weight and bias,
            and the same hidden states, and gets the moments of the whole vocabulary; valid_vocab counts the entries of
            all ranks.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it accepts; with a group on all ranks.
    """
    with refusals_shared(group, teacher_hidden):
        teacher_hidden, weight = checks.autocast(teacher_hidden, weight)
        _check_head("teacher_hidden", teacher_hidden, weight, bias, logit_scale, temperature, chunk_tokens)
        vocab = 0 if group is not None else checks.vocabulary(valid_vocab, weight.shape[0])
        dispatch.check_backend(backend)
        logit_scale, temperature = float(logit_scale), float(temperature)
        if group is not None:
            checks.whole("valid_vocab", valid_vocab)
    if group is not None:
        hidden = teacher_hidden.detach().flatten(0, -2)
        head = Head(weight.detach(), None if bias is None else bias.detach(), None, logit_scale)
        found = sharded.teacher_moments(hidden, head, temperature, valid_vocab, chunk_tokens, backend, group)
        return TeacherMoments(*found, temperature, logit_scale, valid_vocab)
    mean, entropy, bias_mean = teacher_op(
        teacher_hidden.detach().flatten(0, -2),
        weight.detach(),
        None if bias is None else bias.detach(),
        logit_scale,
        temperature,
        vocab,
        chunk_tokens,
        backend,
    )
    return TeacherMoments(mean, entropy, None if bias is None else bias_mean, temperature, logit_scale, valid_vocab)


def linear_kl_div_from_moments(
    student_hidden: Tensor,
    moments: TeacherMoments | None,
    weight: Tensor,
    *,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    valid_vocab: int | None = None,
    chunk_tokens: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """(1 − label_weight) · KL(teacher‖student) + label_weight · NLL(labels), each times T².

    Derivation: docs/maths.md, "The KL of a linear head". Cost: 2 GEMMs of the head's size, forward and backward
    together (3 for 16-bit heads on a GPU).

    Args:
        student_hidden: [N, d]; more leading dimensions are flattened. Differentiable.
        moments: of the same N tokens, computed with this weight, bias, logit_scale, temperature and valid_vocab. With
            label_weight = 1 it may be None: plain cross-entropy, in which rows without a label have weight 0.
        weight: [V, d], student_hidden's dtype, frozen.
        labels: [N] integers in [0, V). A negative one (−100) means no label: the row's label_weight is then 0.
        label_weight: weight of the labels' NLL, in [0, 1]. The NLL is that of softmax(logits / temperature).
        bias: [V], frozen; −inf gives an entry the probability 0.
        logit_scale, temperature, valid_vocab, chunk_tokens, backend: as in `teacher_moments`.
        weights: [N], at least 0. Rows of weight 0 are skipped: they may hold anything.
        reduction: "mean" (over the sum of weights; 0 if that is 0), "sum", or "none" (weighted rows, [N]).
        group: the ranks over which the vocabulary is split (`ops/sharded.py`). Each gives its rows of weight and bias,
            and the same of everything else, and gets the whole loss and gradient. Labels and valid_vocab count the
            entries of all ranks.

    The loss is a difference of numbers of the size of a logit: its absolute error is about 1e-6 in fp32. It is never
    negative. The gradient is as accurate as that of `linear_kl_div`. Heads with a softcap are not linear, so moments
    cannot serve them; `linear_kl_div` does.

    Returns:
        The loss in fp32 (float64 for float64 students): a scalar, or [N] with reduction "none".

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it accepts.
        RuntimeError: on a second derivative, or when the weight was changed in place before the backward.
    """
    with refusals_shared(group, student_hidden):
        student_hidden, weight = checks.autocast(student_hidden, weight)
        _check_head("student_hidden", student_hidden, weight, bias, logit_scale, temperature, chunk_tokens)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient: the moments were made with its old value; "
                    f"freeze it, or use linear_kl_div"
                )
        student = student_hidden.flatten(0, -2)
        tokens = student.shape[0]
        vocab = 0 if group is not None else checks.vocabulary(valid_vocab, weight.shape[0])
        weights = check_weights(weights, tokens, accumulate_dtype(student.dtype), student.device)
        labels = _check_labels(labels, label_weight, tokens, student.device)
        check_reduction(reduction)
        if moments is not None:
            _check_moments(moments, student, bias, logit_scale, temperature)
            if group is None:
                _check_vocabulary(moments, vocab, weight.shape[0])
        else:
            if labels is None or label_weight != 1:
                raise ValueError(
                    f"moments must be given unless label_weight is 1; got None and label_weight {label_weight}"
                )
            labelled = (labels >= 0).to(accumulate_dtype(student.dtype))
            weights = labelled if weights is None else weights * labelled
        dispatch.check_backend(backend)
        logit_scale, temperature, label_weight = float(logit_scale), float(temperature), float(label_weight)
        if group is not None:
            checks.whole("valid_vocab", valid_vocab)
    if group is not None:
        problem = moments_kernels.MomentsProblem(
            student,
            None if moments is None else moments.mean,
            None if moments is None else moments.entropy,
            None if moments is None else moments.bias_mean,
            Head(weight, bias, None, logit_scale),
            labels,
            label_weight,
            weights,
            temperature,
            chunk_tokens,
        )
        made_with = None if moments is None else moments.valid_vocab
        check = None if moments is None else partial(_check_vocabulary, moments)
        rows = sharded.linear_kl_div_from_moments(problem, valid_vocab, made_with, check, backend, group)
        return reduce_rows(rows, weights, reduction)
    rows, _ = student_op(
        student,
        weight,
        bias,
        None if moments is None else moments.mean,
        None if moments is None else moments.entropy,
        None if moments is None else moments.bias_mean,
        labels,
        weights,
        torch.is_grad_enabled() and student.requires_grad,
        label_weight,
        logit_scale,
        temperature,
        vocab,
        chunk_tokens,
        backend,
    )
    return reduce_rows(rows, weights, reduction)


# --- the registered ops -----------------------------------------------------------------------------------------------


@torch.library.custom_op("softprompt_kernels::teacher_moments", mutates_args=())
def teacher_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    temperature: float,
    vocab: int,
    chunk_tokens: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, None, logit_scale).cut(vocab)
    problem = ExpectationProblem(hidden, head, None, None, temperature, chunk_tokens, need_mean=True)
    kernel = dispatch.select(TEACHER_OP, problem, backend, hidden.device)
    arguments = hidden, head, temperature, chunk_tokens, kernel.forward
    function = moments_kernels.teacher_moments
    mean, entropy, bias_mean = run_kernel(f"{TEACHER_OP}.forward", kernel, hidden.device, function, *arguments)
    return mean, entropy, mean.new_empty(0) if bias_mean is None else bias_mean


@teacher_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = hidden.new_empty(hidden.shape, dtype=accumulate_dtype(hidden.dtype))
    tokens = hidden.shape[0]
    return mean, mean.new_empty(tokens), mean.new_empty(0 if bias is None else tokens)


@torch.library.custom_op("softprompt_kernels::linear_kl_div_from_moments", mutates_args=())
def student_op(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    entropy: Tensor | None,
    bias_mean: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    need_gradient: bool,
    label_weight: float,
    logit_scale: float,
    temperature: float,
    vocab: int,
    chunk_tokens: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    head = Head(weight, bias, None, logit_scale).cut(vocab)
    problem = moments_kernels.MomentsProblem(
        student, mean, entropy, bias_mean, head, labels, label_weight, weights, temperature, chunk_tokens
    )
    expectation = ExpectationProblem(student, head, labels, weights, temperature, chunk_tokens, need_gradient)
    kernel = dispatch.select(STUDENT_OP, expectation, backend, student.device)
    rows, gradient = run_kernel(
        f"{STUDENT_OP}.forward", kernel, student.device, moments_kernels.forward, problem, need_gradient, kernel.forward
    )
    dtype = row_gradient_dtype(student.dtype)
    return rows, student.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)


@student_op.register_fake
def _(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    entropy: Tensor | None,
    bias_mean: Tensor | None,
    labels: Tensor | None,
    weights: Tensor | None,
    need_gradient: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    rows = student.new_empty(student.shape[0], dtype=accumulate_dtype(student.dtype))
    return rows, student.new_empty(student.shape if need_gradient else 0, dtype=row_gradient_dtype(student.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    # The weight is saved only so that changing it in place before the backward is an error, as for a linear layer.
    ctx.save_for_backward(output[1], *inputs[:2])


def _backward(ctx: Any, grad_rows: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    stored, student, _weight = ctx.saved_tensors
    return scale_rows(stored, grad_rows, student, STUDENT_OP), *[None] * 14


student_op.register_autograd(_backward, setup_context=_setup_context)


# --- argument checks --------------------------------------------------------------------------------------------------


def _check_head(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    checks.hidden_and_weight(name, hidden, "weight", weight)
    checks.same_dtype_and_device("weight", weight, name, hidden)
    checks.head_options(weight, bias, logit_scale, chunk_tokens)
    checks.positive("temperature", temperature)


def _check_labels(labels: Tensor | None, label_weight: float, tokens: int, device: torch.device) -> Tensor | None:
    if not 0 <= label_weight <= 1:
        raise ValueError(f"label_weight must be in [0, 1]; got {label_weight}")
    if labels is None:
        if label_weight > 0:
            raise ValueError(f"labels must be given with a label_weight above 0; got None with {label_weight}")
        return None
    checks.integers("labels", labels.reshape(-1) if isinstance(labels, Tensor) else labels, tokens, "N", device)
    return labels.reshape(-1).to(torch.int64).contiguous()


def _check_moments(
    moments: TeacherMoments,
    student: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    temperature: float,
) -> None:
    if not isinstance(moments, TeacherMoments):
        raise TypeError(f"moments must be TeacherMoments; got {type(moments).__name__}")
    _check_setting("temperature", temperature, moments.temperature)
    _check_setting("logit_scale", logit_scale, moments.logit_scale)
    if (bias is None) != (moments.bias_mean is None):
        raise ValueError(
            f"bias must be {'None' if moments.bias_mean is None else 'given'}, as for the moments; "
            f"got {'None' if bias is None else 'a tensor'}"
        )
    dtype = accumulate_dtype(student.dtype)
    shapes = (("mean", moments.mean, student.shape), ("entropy", moments.entropy, student.shape[:1]))
    for name, tensor, shape in shapes:
        checks.shape(f"moments.{name}", tensor, "of the student's tokens", tuple(shape))
        checks.device(f"moments.{name}", tensor, student.device)
        if tensor.dtype != dtype:
            raise TypeError(f"moments.{name} must be {dtype} for a student in {student.dtype}; got {tensor.dtype}")


def _check_vocabulary(moments: TeacherMoments, vocab: int, rows: int) -> None:
    """The moments were made with the `vocab` entries that count, of a head of `rows` entries."""
    _check_setting("valid_vocab", vocab, rows if moments.valid_vocab is None else moments.valid_vocab)


def _check_setting(name: str, got: float, made: float) -> None:
    if got != made:
        raise ValueError(f"{name} must be {made}, which the moments were made with; got {got}")
