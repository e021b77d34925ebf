"""Scores of a tile of rows and a tile of keys, and which of them count.

Scores are in units of log 2, so that exponentials are exp2: S₂ = scale · log₂e · ⟨q, k⟩, or with a softcap
softcap · log₂e · tanh(scale / softcap · ⟨q, k⟩).

Own key j stands at j, prompt key p at p − len, and a row at `relative`. With that one rule,

    visible = (key <= relative)  and  (relative − key < window)  and the key is no padding

serves prompt and own keys alike.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """Accurate to a few ulp: a series where 1 − 2 / (e^2x + 1) would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


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
