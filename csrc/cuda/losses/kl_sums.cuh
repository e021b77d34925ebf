// The first sweep of a divergence: maxima and sums of a row together, each thread over its own words.
//
// For KL(p || q), with e_p = exp(z_p - max z_p), e_q likewise, S = sum of e_p, and the centred difference
// D = (z_q - max z_q) - (z_p - max z_p), so that e_q = e_p e^D:
//
//     E = sum of (e_q - e_p) / S,  X = sum of (e_q - e_p - e_p D) / S,  L = log1p(E),  delta = D - L = log q/p
//     KL = X + (L - E)            where |E| < 1/2: both terms are of the size of D^2, and no digit is lost as q goes to p
//     KL = L - sum of e_p D / S   elsewhere
//
// When a maximum moves, what was summed with the old ones is carried over. With f_p = exp(old - new max z_p), f_q
// likewise, a = new - old (max z_q - max z_p) and phi(x) = e^x - 1 - x,
//
//     sum of e_p D       becomes  f_p (sum of e_p D - a sum of e_p)
//     sum of e_q - e_p            f_q sum of (e_q - e_p) + f_p expm1(-a) sum of e_p
//     sum of e_p phi(D)           f_p sum of e_p phi(D) + f_p expm1(-a) sum of (e_q - e_p) + f_p phi(-a) sum of e_p
//
// which keeps the sizes of all terms. For |D| <= 1 the terms are e_p times a polynomial in D; elsewhere they are written
// with e_q, which is never above 1.
#pragma once

#include "cuda/elementwise.cuh"
#include "tensor.h"

namespace softprompt {

__device__ __forceinline__ float base_of(float largest) { return largest == -kInfinity ? 0.0f : largest; }

// D of a word; of two words of -inf, 0.
__device__ __forceinline__ float difference_of(float p, float q, float apart, float scale) {
  return p == -kInfinity && q == -kInfinity ? 0.0f : ((q - p) - apart) * scale;
}

template <Divergence kKind>
struct RowSums {
  float p_max = -kInfinity, q_max = -kInfinity;
  float total = 0, other = 0;   // of e_p, e_q
  float change = 0;             // of e_q - e_p
  float excess = 0;             // of e_q - e_p - e_p D
  float difference = 0;         // of e_p D

  // What has been summed, as if the maxima had been these.
  __device__ __forceinline__ void carry_over(float p_largest, float q_largest, float scale) {
    const float p_base = base_of(p_largest), q_base = base_of(q_largest);
    const float fp = p_max == -kInfinity ? 0.0f : exp_fast((p_max - p_base) * scale);
    const float fq = q_max == -kInfinity ? 0.0f : exp_fast((q_max - q_base) * scale);
    const float a = ((q_base - p_base) - (base_of(q_max) - base_of(p_max))) * scale;
    const bool near = fabsf(a) <= 1 && p_max > -kInfinity && q_max > -kInfinity;
    const float a_excess = excess_near(-a);
    const float first = near ? fp * (a_excess - a) : fq - fp;  // f_p expm1(-a)
    if (kKind != Divergence::jsd) {
      const float second = near ? fp * a_excess : first + fp * a;  // f_p phi(-a)
      if (excess != kInfinity) excess = fp * excess + first * change + second * total;
      difference = fp * (difference - a * total);
    }
    change = fq * change + first * total;
    total *= fp;
    other *= fq;
    p_max = p_largest;
    q_max = q_largest;
  }

  // Makes room for words that are as large as these.
  __device__ __forceinline__ void raise(float p_largest, float q_largest, float scale) {
    if (p_largest > p_max || q_largest > q_max) carry_over(fmaxf(p_max, p_largest), fmaxf(q_max, q_largest), scale);
  }

  __device__ __forceinline__ void add(float p, float q, float scale) {
    const float p_base = base_of(p_max), q_base = base_of(q_max);
    const float ep = exp_fast((p - p_base) * scale), eq = exp_fast((q - q_base) * scale);
    const float d = difference_of(p, q, q_base - p_base, scale);
    const bool close = fabsf(d) <= 1;
    const float d_excess = excess_near(d);
    const float added = close ? ep * (d + d_excess) : eq - ep;
    total += ep;
    other += eq;
    change += added;
    if (kKind != Divergence::jsd) {
      const float cost = fabsf(d) < kInfinity ? ep * d : 0.0f;
      excess += d == -kInfinity ? kInfinity : close ? ep * d_excess : added - cost;
      difference += cost;
    }
  }
};

// l = log m/p_t and r = log p_s/m of delta = log p_s/p_t, with m = beta p_t + (1 - beta) p_s.
__device__ __forceinline__ float2 mixture_of(float delta, float beta) {
  if (fabsf(delta) <= 1) {
    const float near = log1p_near((1.0f - beta) * (delta + excess_near(delta)));
    return {near, delta - near};
  }
  // By the smaller of the two, which is e^-|delta| times the larger.
  const float ratio = exp_fast(-fabsf(delta));
  const bool positive = delta > 0;
  const float far = logf(positive ? (1.0f - beta) + beta * ratio : beta + (1.0f - beta) * ratio);
  return positive ? float2{delta + far, -far} : float2{far, delta - far};
}

// p x, and 0 where x is infinite: there p is 0.
__device__ __forceinline__ float weighted(float p, float x) { return fabsf(x) == kInfinity ? 0.0f : p * x; }

}  // namespace softprompt
