"""Divergences of rows of logits, in place: few passes over buffers that stay in the cache.

Losses and gradients are those of `kernels/reference/divergence.py`, computed from unnormalised exponentials. For
KL(p‖q), with e = exp(z_p − max z_p), S = Σ e and the centred difference D = (z_q − max z_q) − (z_p − max z_p),

    E = E_p[expm1(D)],   KL = E_p[expm1(D) − D] + (log1p(E) − E),   q − p = p (expm1(D) − E) / (1 + E)

These keep their relative accuracy as q goes to p: the first term is a sum of terms of the size of D², and so is the
second. No exponential of z_q is needed. But D must be finite and at most MAX_DIFFERENCE, so that p · e^D stays in the
range of fp32. All other rows are computed by the reference.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.loss import FORWARD, JSD, REVERSE, Divergence, unknown_divergence
from softprompt_kernels.kernels.ranges import kernel_range
from softprompt_kernels.kernels.reference import divergence as reference

# e^48 times the smallest normal fp32 number, 1.2e-38, is 1e-17: underflow of p takes nothing from p · e^D.
MAX_DIFFERENCE = 48.0
SCRATCH_BUFFERS = 2


def divergence_(student: Tensor, teacher: Tensor, divergence: Divergence, scratch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss [b] of rows [b, V]. `student` becomes the gradient by the student's logits; the others are overwritten."""
    with kernel_range("divergence_", *student.shape):
        return _divergence_(student, teacher, divergence, *scratch)


def _divergence_(student: Tensor, teacher: Tensor, divergence: Divergence, difference: Tensor, spare: Tensor) -> Tensor:
    kind = divergence.kind
    student_max, teacher_max = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
    shift = student_max - teacher_max
    if kind in (FORWARD, JSD):
        torch.sub(student, teacher, out=difference).sub_(shift)
    elif kind == REVERSE:
        torch.sub(teacher, student, out=difference).add_(shift)
    else:
        raise unknown_divergence(kind)
    smallest, largest = torch.aminmax(difference)
    if not (smallest > -torch.inf and largest <= MAX_DIFFERENCE):  # NaN (−inf − −inf) fails both
        loss, gradient = reference.rows(student, teacher, divergence)
        student.copy_(gradient)
        return loss
    if kind == FORWARD:
        return _forward_(student, teacher.sub_(teacher_max).exp_(), difference)
    student.sub_(student_max).exp_()
    if kind == REVERSE:
        return _reverse_(student, difference, teacher, spare)
    if kind == JSD:
        return _jsd_(student, teacher.sub_(teacher_max).exp_(), difference, divergence.beta, spare)
    raise unknown_divergence(kind)


def _forward_(gradient: Tensor, teacher: Tensor, difference: Tensor) -> Tensor:
    """`teacher` holds e of p_t, `difference` D = z_s − z_t; `gradient` is written only."""
    total = teacher.sum(1, keepdim=True)
    change = torch.expm1(difference, out=gradient)
    excess = torch.sub(change, difference, out=difference).mul_(teacher).sum(1, keepdim=True).div_(total)
    mean_change = change.mul_(teacher).sum(1, keepdim=True).div_(total)  # E
    change.addcmul_(teacher, -mean_change).mul_(1 / (total * (1 + mean_change)))
    return _loss(excess, mean_change)


def _reverse_(student: Tensor, difference: Tensor, scratch: Tensor, spare: Tensor) -> Tensor:
    """`student` holds e of p_s, `difference` D = z_t − z_s. The gradient p_s (log p_s/p_t − KL) is p_s (E_s[D] − D)."""
    total = student.sum(1, keepdim=True)
    change = torch.expm1(difference, out=scratch)
    mean_change = torch.mul(change, student, out=spare).sum(1, keepdim=True).div_(total)  # E
    excess = change.sub_(difference).mul_(student).sum(1, keepdim=True).div_(total)
    student.mul_(difference.sub_(mean_change - excess)).mul_(-1 / total)
    return _loss(excess, mean_change)


def _loss(excess: Tensor, mean_change: Tensor) -> Tensor:
    """E_p[expm1(D) − D] + (log1p(E) − E), [b]."""
    exact = mean_change.double()
    return (excess + (torch.log1p(exact) - exact)).clamp_(min=0).squeeze(1).to(excess.dtype)


def _jsd_(student: Tensor, teacher: Tensor, difference: Tensor, beta: float, scratch: Tensor) -> Tensor:
    """`student` and `teacher` hold e of p_s and p_t. With l = log m/p_t, r = log p_s/m: loss (1−β) E_s[r] − β E_t[l].

    An error in the normalisers of δ = l + r changes this loss only in second order.
    """
    student_total, teacher_total = student.sum(1, keepdim=True), teacher.sum(1, keepdim=True)
    delta = difference.sub_(torch.log(student_total / teacher_total))
    mixture = torch.expm1(delta, out=scratch).mul_(1 - beta).log1p_()  # l
    ratio = delta.sub_(mixture)  # r
    teacher_cost = mixture.mul_(teacher).sum(1, keepdim=True).div_(teacher_total)
    student_cost = torch.mul(ratio, student, out=scratch).sum(1, keepdim=True).div_(student_total)
    student.mul_(ratio.sub_(student_cost)).mul_((1 - beta) / student_total)
    return ((1 - beta) * student_cost - beta * teacher_cost).clamp_(min=0).squeeze(1)
