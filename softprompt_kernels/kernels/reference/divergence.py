"""Divergences of rows of logits and their gradients: the definition.

Let δ = log p_s − log p_t be the log-ratio and φ(δ) = e^δ − 1 − δ ≥ 0 the excess. φ is small near δ = 0, which keeps the
relative accuracy of a loss that goes to 0. (The terms e^δ − 1 sum to 0, since Σ p_s = Σ p_t.)

    kind     loss                                           ∂ loss / ∂ z_s
    forward  KL(p_t‖p_s) = Σ p_t φ(δ)                       p_s − p_t
    reverse  KL(p_s‖p_t) = Σ p_s φ(−δ)                      p_s (δ − KL)
    jsd      β Σ p_t φ(log m/p_t) + (1−β) Σ p_s φ(log m/p_s)   (1−β) p_s (log p_s/m − KL(p_s‖m)),  m = β p_t + (1−β) p_s

An error ε in the normalisers of δ changes Σ p_t φ(δ) only by ε²/2.

A logit of −inf is a probability of 0. A term p log(p/q) is 0 where p = 0. It is +inf where only q = 0; the divergence
is then +inf, and its gradient is p_s − p_t for forward, as always, and 0 for reverse. A teacher row without a finite
logit has loss 0 and gradient 0. A student row without one has loss +inf and gradient 0.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.loss import FORWARD, JSD, REVERSE, Divergence, unknown_divergence


def rows(student: Tensor, teacher: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient [N, V] by the student's logits, both [N, V] and already divided by the temperature."""
    student_max, teacher_max = finite_max(student), finite_max(teacher)
    student_exp, teacher_exp = torch.exp(student - student_max), torch.exp(teacher - teacher_max)
    student_sum, teacher_sum = student_exp.sum(-1, keepdim=True), teacher_exp.sum(-1, keepdim=True)
    no_student, no_teacher = student_sum == 0, teacher_sum == 0
    p_s = student_exp / torch.where(no_student, 1, student_sum)
    p_t = teacher_exp / torch.where(no_teacher, 1, teacher_sum)
    # Differences first, normalisers after: equal logits give exactly 0, and close ones lose no digits.
    delta = student - teacher - (student_max - teacher_max) - torch.log(student_sum / teacher_sum)
    if divergence.kind == FORWARD:
        loss, gradient = kl_sum(p_t, p_s, delta), p_s - p_t
    elif divergence.kind == REVERSE:
        loss = kl_sum(p_s, p_t, -delta)
        gradient = torch.where(p_s == 0, 0, p_s * (delta - loss))
        gradient = torch.where(torch.isinf(loss), 0, gradient)
    elif divergence.kind == JSD:
        loss, gradient = _jsd(p_s, p_t, delta, divergence.beta)
    else:
        raise unknown_divergence(divergence.kind)
    loss = torch.where(no_student, torch.inf, loss)
    loss = torch.where(no_teacher, 0, loss)
    return loss.squeeze(-1), torch.where(no_student | no_teacher, 0, gradient)


def finite_max(logits: Tensor) -> Tensor:
    """The largest logit [N, 1]; 0 for rows of −inf, and for an empty vocabulary."""
    largest = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    return torch.where(torch.isinf(largest), 0, largest)


def kl_sum(p: Tensor, q: Tensor, delta: Tensor) -> Tensor:
    """Σ p φ(δ) [N, 1], with δ = log q/p. Where δ is large, p φ(δ) is q − p − p δ, which cannot overflow."""
    cost = torch.where(p == 0, 0, p * delta)
    near = delta <= 1
    excess = torch.where(
        near, p * (torch.expm1(torch.where(near, delta, 0)) - torch.where(near, delta, 0)), q - p - cost
    )
    return torch.where(p == 0, q, excess).sum(-1, keepdim=True)


def _jsd(p_s: Tensor, p_t: Tensor, delta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    mixture = beta * p_t + (1 - beta) * p_s
    mixture_over_teacher = log_mix(delta, 1 - beta)
    mixture_over_student = log_mix(-delta, beta)
    student_cost = kl_sum(p_s, mixture, mixture_over_student)
    loss = beta * kl_sum(p_t, mixture, mixture_over_teacher) + (1 - beta) * student_cost
    gradient = (1 - beta) * p_s * (-mixture_over_student - student_cost)
    return loss, torch.where(p_s == 0, 0, gradient)


def log_mix(delta: Tensor, share: float) -> Tensor:
    """log((1 − share) + share · e^δ), accurate near δ = 0 and safe for large δ."""
    near = torch.log1p(share * torch.expm1(torch.clamp(delta, max=1)))
    far = delta + torch.log(share + (1 - share) * torch.exp(-torch.clamp(delta, min=0)))
    return torch.where(delta <= 1, near, far)
