"""Scores of a tile of rows and a tile of keys, and which of them count.

Scores are in units of log 2, so that exponentials are exp2: S₂ = scale · log₂e · ⟨q, k⟩, or with a softcap
softcap · log₂e · tanh(scale / softcap · ⟨q, k⟩).

Own key j stands at j, prompt key p at p − len, and a row at `relative`. With that one rule,

    visible = (key <= relative)  and  (relative − key < window)  and the key is no padding

serves prompt and own keys alike.
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.elementwise import LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score(left, right, scoring, VARIANT: tl.constexpr):
    """S₂ of [rows, D] and [D, columns]."""
    product = tl.dot(left, right, input_precision=VARIANT.precision)
    if VARIANT.capped:
        return tanh(product * (scoring.scale / scoring.softcap)) * (scoring.softcap * LOG2E)
    else:
        return product * (scoring.scale * LOG2E)


@triton.jit
def score_slope(scores, scoring, VARIANT: tl.constexpr):
    """∂ softcap tanh(x / softcap) / ∂ x = 1 − tanh², of unmasked S₂."""
    fraction = scores / (scoring.softcap * LOG2E)
    return 1 - fraction * fraction


@triton.jit
def visible(relative, key, scoring, VARIANT: tl.constexpr):
    """Of rows and keys at positions that broadcast, where there is a causal rule; padding is the caller's."""
    if VARIANT.windowed:
        return (key <= relative) & (relative - key < scoring.window)
    else:
        return key <= relative
