"""Functions of one number that the loss kernels need with relative accuracy at 0, from arithmetic and exp2 alone.

CUDA's own expm1, log1p and tanh come with libdevice, which neither ROCm nor the interpreter has. Errors named are of
the formula; fp32 rounds at 6e-8, and the hardware's exp2 is good to 2e-7.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def excess_near(x):
    """e^x − 1 − x for |x| ≤ 1: its Taylor series, 5e-8 of the result."""
    p = x * 2.755731922e-07 + 2.755731922e-06
    p = p * x + 2.480158730e-05
    p = p * x + 1.984126984e-04
    p = p * x + 1.388888889e-03
    p = p * x + 8.333333333e-03
    p = p * x + 4.166666667e-02
    p = p * x + 1.666666667e-01
    p = p * x + 0.5
    return p * x * x


@triton.jit
def _atanh_tail(square):
    """(atanh(s) / s − 1) / s² of s² ≤ 1/9: 1e-8."""
    p = square * 0.06666666667 + 0.07692307692
    p = p * square + 0.09090909091
    p = p * square + 0.1111111111
    p = p * square + 0.1428571429
    p = p * square + 0.2
    return p * square + 0.3333333333


@triton.jit
def log1p(u):
    """log(1 + u), u > −1. Near 0 it is 2 atanh(s) with s = u / (2 + u)."""
    s = u / (2.0 + u)
    near = 2.0 * s + 2.0 * s * s * s * _atanh_tail(s * s)
    return tl.where((u >= -0.5) & (u <= 1.0), near, tl.log(1.0 + u))


@triton.jit
def log1p_minus(u):
    """log(1 + u) − u for |u| ≤ ½. With s as above, u = 2 s / (1 − s), so that 2 s − u is −s u."""
    s = u / (2.0 + u)
    return 2.0 * s * s * s * _atanh_tail(s * s) - s * u


@triton.jit
def tanh(x):
    """Near 0 an odd minimax polynomial (4e-9), else 1 − 2 / (e^2x + 1)."""
    magnitude = tl.abs(x)
    u = x * x
    p = u * -0.0057170472473729765 + 0.020650589400853344
    p = p * u - 0.053743498770095814
    p = p * u + 0.1333149129577072
    p = p * u - 0.3333328392562077
    near = p * u * magnitude + magnitude
    # Where e^2x overflows, it is 1.
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    result = tl.where(magnitude < 0.625, near, far)
    return tl.where(x < 0, -result, result)
