"""Scores of a query tile and a key tile, and the causal and window mask.

Scores are in units of log 2, so exponentials are exp2: S₂ = scale · log₂e · ⟨q, k⟩, or with a softcap
softcap · log₂e · tanh(scale / softcap · ⟨q, k⟩).

Positions count from the first own key: own key j is at j, prompt key p at p − len, query i at (N − M) + i. So one rule
serves prompt keys and own keys alike:

    a query sees a key where  (key <= query)  and  (query − key < window)  and the key is no padding
"""

import triton
import triton.language as tl

from softprompt_kernels.kernels.triton.elementwise import LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score(tile, transposed_tile, scoring, VARIANT: tl.constexpr):
    """S₂ of a query tile [rows, D] and a transposed key tile [D, keys], or of a key and a transposed query tile."""
    dots = tl.dot(tile, transposed_tile, input_precision=VARIANT.precision)
    if VARIANT.capped:
        return tanh(dots * (scoring.scale / scoring.softcap)) * (scoring.softcap * LOG2E)
    else:
        return dots * (scoring.scale * LOG2E)


@triton.jit
def score_slope(scores, scoring, VARIANT: tl.constexpr):
    """∂ softcap tanh(x / softcap) / ∂ x = 1 − tanh², from unmasked S₂."""
    fraction = scores / (scoring.softcap * LOG2E)
    return 1 - fraction * fraction


@triton.jit
def position_mask(query_position, key_position, scoring, VARIANT: tl.constexpr):
    """The causal and window mask of positions that broadcast; padding is left to the caller."""
    if VARIANT.windowed:
        return (key_position <= query_position) & (query_position - key_position < scoring.window)
    else:
        return key_position <= query_position
