"""Elementwise functions that the kernels need with relative accuracy near 0, built from arithmetic and exp2 alone.

CUDA's own expm1, log1p and tanh come from libdevice, which neither ROCm nor the interpreter has. The errors given here
are relative errors of the formulas; fp32 rounding adds 6e-8, and the hardware's exp2 is accurate to 2e-7.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def excess_near(x):
    """φ(x) = e^x − 1 − x for |x| ≤ 1: x² times a polynomial fitted at Chebyshev points; error 1e-7, exact at 0."""
    p = x * 2.52884349027e-05 + 0.000203290419095
    p = p * x + 0.00138864477408
    p = p * x + 0.00833088616886
    p = p * x + 0.0416666972098
    p = p * x + 0.166666972909
    p = p * x + 0.5
    return p * x * x


@triton.jit
def _atanh_tail(square):
    """(atanh(s) / s − 1) / s² for |s| ≤ 0.4622 = tanh(½), fitted at Chebyshev points; error 1e-7 (2e-9 of atanh(s))."""
    p = square * 0.140620033171 + 0.0737093885319
    p = p * square + 0.113123037586
    p = p * square + 0.142753464466
    p = p * square + 0.200001925467
    return p * square + 0.333333327602


@triton.jit
def log1p_near(u):
    """log(1 + u) for 1/e ≤ 1 + u ≤ e, as 2 atanh(s) with s = u / (2 + u)."""
    s = u / (2.0 + u)
    return 2.0 * s + 2.0 * s * s * s * _atanh_tail(s * s)


@triton.jit
def log1p_minus(u):
    """log(1 + u) − u for 1/e ≤ 1 + u ≤ e. With s as above, u = 2 s / (1 − s), so 2 s − u = −s u."""
    s = u / (2.0 + u)
    return 2.0 * s * s * s * _atanh_tail(s * s) - s * u


@triton.jit
def tanh(x):
    """tanh: an odd minimax polynomial near 0 (error 4e-9), elsewhere 1 − 2 / (e^2x + 1)."""
    magnitude = tl.abs(x)
    u = x * x
    p = u * -0.0057170472473729765 + 0.020650589400853344
    p = p * u - 0.053743498770095814
    p = p * u + 0.1333149129577072
    p = p * u - 0.3333328392562077
    near = p * u * magnitude + magnitude
    # 1 where e^2x overflows.
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    result = tl.where(magnitude < 0.625, near, far)
    return tl.where(x < 0, -result, result)
