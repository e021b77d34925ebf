"""The forward KL from moments: all steps without the vocabulary's size, shared by all backends.

For a linear head p_h(v) ∝ exp(z_v), z = s (W h + b) / T, is an exponential family with log-partition A(h) = lse(z).
With the teacher's moments m = E_{p_t}[W], b_m = E_{p_t}[b] and its entropy H,

    KL(p_t‖p_h) = A(h) − s (⟨m, h⟩ + b_m) / T − H,        ∂ KL / ∂ h = s (E_{p_h}[W] − m) / T

and a label y is the moments W_y, b_y with entropy 0. So with λ the weight of the label

    loss = T² [ A(h) − (1−λ) (s (⟨m, h⟩ + b_m) / T + H) − λ z_y ] = T² [ (1−λ) KL(p_t‖p_h) + λ NLL(y) ].

H is stored as A(h_t) − s (⟨m, h_t⟩ + b_m) / T with the rounded m. Then the loss is the Bregman divergence
A(h) − A(h_t) − s ⟨m, h − h_t⟩ / T, in which an error in m is multiplied by the distance h − h_t.

A backend supplies `expectation(problem) -> Expectation`: 1 GEMM of the head's size for A, and 1 for the mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import accumulate_dtype
from softprompt_kernels.kernels.problems.loss import Expectation, ExpectationProblem, Head

ExpectationKernel = Callable[[ExpectationProblem], Expectation]

_CPU_BLOCK = 2**19  # elements of a copy in another dtype, which stays in the cache
_GPU_BLOCK = 2**23  # larger, for fewer launches


@dataclass(frozen=True)
class MomentsProblem:
    """The loss of a student against the moments of a teacher and, with a weight, against labels."""

    student: Tensor  # [N, d]
    mean: Tensor | None  # [N, d]; None: labels only
    entropy: Tensor | None  # [N]
    bias_mean: Tensor | None  # [N]
    head: Head
    labels: Tensor | None  # [N] int64, negative: none
    label_weight: float
    weights: Tensor | None  # [N], None: all 1
    temperature: float
    chunk_tokens: int | None


def teacher_moments(
    hidden: Tensor, head: Head, temperature: float, chunk_tokens: int | None, expectation: ExpectationKernel
) -> tuple[Tensor, Tensor, Tensor | None]:
    """mean [N, d], entropy [N] and bias_mean [N], in the compute dtype."""
    found = expectation(ExpectationProblem(hidden, head, None, None, temperature, chunk_tokens, need_mean=True))
    assert found.mean is not None
    linear = _expected_logit(found.mean, hidden, found.bias_mean, head.logit_scale / temperature)
    entropy = found.log_partition.double() - linear
    return found.mean, entropy.to(found.mean.dtype), found.bias_mean


def forward(
    problem: MomentsProblem, need_gradient: bool, expectation: ExpectationKernel, labels_subtracted: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row [N], and ∂ loss[n] / ∂ student[n] [N, d] if it is needed.

    `labels_subtracted`: the mean that `expectation` gives is E_p[W] − λ W_y already.
    """
    temperature, head = problem.temperature, problem.head
    labels = problem.labels if problem.label_weight > 0 else None
    found = expectation(
        ExpectationProblem(
            problem.student, head, labels, problem.weights, temperature, problem.chunk_tokens, need_gradient
        )
    )
    dtype = accumulate_dtype(problem.student.dtype)
    # [N] in float64: the terms have the size of a logit, and their sum may be as small as a divergence.
    loss = found.log_partition.double()
    row_label_weight = torch.zeros_like(loss)  # λ of each row
    if labels is not None and found.label_logit is not None:
        row_label_weight.masked_fill_(labels >= 0, problem.label_weight)
        loss = loss - row_label_weight * found.label_logit.double()
    if problem.mean is not None and problem.entropy is not None:
        linear = _expected_logit(problem.mean, problem.student, problem.bias_mean, head.logit_scale / temperature)
        loss = loss - (1 - row_label_weight) * (linear + problem.entropy.double())
    # Both terms are at least 0, but rounding may give less.
    loss = (loss.clamp(min=0) * temperature**2).to(dtype)
    gradient = found.mean
    if gradient is not None:
        _subtract_targets_(gradient, problem, labels, row_label_weight.to(dtype)[:, None], labels_subtracted)
        gradient.mul_(head.logit_scale * temperature)
    if problem.weights is not None:
        loss = torch.where(problem.weights == 0, 0, loss)
        if gradient is not None:
            gradient.masked_fill_(problem.weights[:, None] == 0, 0)
    return loss, gradient


def _subtract_targets_(
    mean: Tensor,
    problem: MomentsProblem,
    labels: Tensor | None,
    row_label_weight: Tensor,
    labels_subtracted: bool,
) -> None:
    """E_p[W] becomes E_p[W] − (1−λ) m − λ W_y, in place."""
    if problem.mean is not None and labels is None:
        mean -= problem.mean
    elif problem.mean is not None:
        mean.addcmul_(problem.mean, row_label_weight - 1)
    if labels is not None and not labels_subtracted:
        for rows in _blocks(mean):
            label_rows = problem.head.weight[labels[rows].clamp(min=0)].to(mean.dtype)
            mean[rows].addcmul_(label_rows, row_label_weight[rows], value=-1)


def _expected_logit(mean: Tensor, hidden: Tensor, bias_mean: Tensor | None, scale: float) -> Tensor:
    """s (⟨m, h⟩ + b_m) / T of each row, [N] in float64."""
    linear = torch.empty(mean.shape[0], dtype=torch.float64, device=mean.device)
    for rows in _blocks(mean):
        linear[rows] = (mean[rows].double() * hidden[rows].double()).sum(-1)
    return scale * (linear if bias_mean is None else linear + bias_mean.double())


def _blocks(tensor: Tensor) -> Iterator[slice]:
    """Slices of rows, small enough for a copy of one in another dtype."""
    block = _CPU_BLOCK if tensor.device.type == "cpu" else _GPU_BLOCK
    step = max(1, block // max(1, tensor.shape[1]))
    return (slice(start, start + step) for start in range(0, tensor.shape[0], step))
