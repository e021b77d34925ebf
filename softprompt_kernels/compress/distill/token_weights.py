"""Weights of tokens in the training loss.

    loss = Σ_i w_i l_i / Σ_i w_i       over all tokens i of a batch; the weights are constants, without a gradient

| name | w_i | what counts less |
|---|---|---|
| uniform | 1 | nothing |
| entropy | H(p_t): the teacher's entropy, nats | tokens that the teacher is certain of |
| student | 1 − exp(−l_i / T²), l_i the divergence now | tokens that the student has already |

T is the temperature of the loss. "entropy" is in the spirit of EGAD (arXiv 2605.01732), which moves its weight to
tokens of high entropy. "student" is the weight of the focal loss (arXiv 1708.02002) with exp(−divergence) in place of
the probability. A divergence from the teacher is what Rho-1 (arXiv 2404.07965) calls excess loss. An NLL is not: it
stays above 0 for a perfect student, and so does not say what the student has.

Cost: none beside the loss. "entropy" keeps one more number a token where the objective has no moments, which costs a
GEMM with the head once.
"""

from __future__ import annotations

from torch import Tensor


def entropy_weights(entropy: Tensor) -> Tensor:
    """`[n]`: the weights for the teacher's `entropy [n]`, nats. Rounding may have made an entropy negative."""
    return entropy.clamp(min=0)


def student_weights(losses: Tensor, temperature: float) -> Tensor:
    """`[n]`: the weights for the student's `losses [n]`, which are those at `temperature`, times its square."""
    return -(-losses.detach().clamp(min=0) / temperature**2).expm1()
