// Scalar functions that keep their relative accuracy near 0, and constants.
//
// The polynomials are those of kernels/triton/elementwise.py, fitted at Chebyshev nodes. The errors given are those of
// the formula, without rounding.
#pragma once

#include <limits>

#include "cuda/arch.cuh"

namespace softprompt {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x - 1 - x for |x| <= 1, as x^2 times a polynomial. Relative error 1e-7, exact at 0.
__device__ __forceinline__ float excess_near(float x) {
  float p = fmaf(x, 2.52884349027e-05f, 0.000203290419095f);
  p = fmaf(p, x, 0.00138864477408f);
  p = fmaf(p, x, 0.00833088616886f);
  p = fmaf(p, x, 0.0416666972098f);
  p = fmaf(p, x, 0.166666972909f);
  p = fmaf(p, x, 0.5f);
  return p * x * x;
}

// (atanh(s) / s - 1) / s^2 from s^2, for |s| <= tanh(1/2). Relative error 1e-7, which makes 2e-9 in atanh(s).
__device__ __forceinline__ float atanh_tail(float square) {
  float p = fmaf(square, 0.140620033171f, 0.0737093885319f);
  p = fmaf(p, square, 0.113123037586f);
  p = fmaf(p, square, 0.142753464466f);
  p = fmaf(p, square, 0.200001925467f);
  return fmaf(p, square, 0.333333327602f);
}

// log(1 + u) for 1/e <= 1 + u <= e, as 2 atanh(s) with s = u / (2 + u).
__device__ __forceinline__ float log1p_near(float u) {
  const float s = u / (2.0f + u);
  return 2.0f * s + 2.0f * s * s * s * atanh_tail(s * s);
}

// log(1 + u) - u on the same interval. With s as above, u = 2 s / (1 - s), so 2 s - u = -s u.
__device__ __forceinline__ float log1p_minus(float u) {
  const float s = u / (2.0f + u);
  return 2.0f * s * s * s * atanh_tail(s * s) - s * u;
}

__device__ __forceinline__ float exp_fast(float x) { return arch::exp2_fast(x * kLog2e); }

}  // namespace softprompt
