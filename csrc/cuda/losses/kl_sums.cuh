// The first pass of a divergence: maxima and sums of a row in one pass, for the vocabulary entries of one thread.
//
// p is the distribution that the KL takes its expectation over: see DivergenceTraits.
// For KL(p || q), with e_p = exp(z_p - max z_p), e_q likewise, S = sum of e_p, and the centred difference
// D = (z_q - max z_q) - (z_p - max z_p), so that e_q = e_p e^D:
//
//     E = sum of (e_q - e_p) / S,  X = sum of (e_q - e_p - e_p D) / S,  L = log1p(E),  delta = D - L = log q/p
//     KL = X + (L - E)            if |E| < 1/2: both terms have the size of D^2, so no digits are lost as q nears p
//     KL = L - sum of e_p D / S   otherwise
//
// When a maximum grows, the sums are rescaled to the new maxima. With f_p = exp(old - new max z_p), f_q likewise,
// a = new - old (max z_q - max z_p) and phi(x) = e^x - 1 - x,
//
//     sum of e_p D       becomes  f_p (sum of e_p D - a sum of e_p)
//     sum of e_q - e_p            f_q sum of (e_q - e_p) + f_p expm1(-a) sum of e_p
//     sum of e_p phi(D)           f_p sum of e_p phi(D) + f_p expm1(-a) sum of (e_q - e_p) + f_p phi(-a) sum of e_p
//
// so every term keeps its size. For |D| <= 1 the terms are computed as e_p times a polynomial in D. Otherwise they are
// computed with e_q, which is at most 1.
#pragma once

#include "cuda/elementwise.cuh"
#include "tensor.h"

namespace softprompt {

// What distinguishes the divergences. There is no definition for an unknown one, so a kernel of it does not compile.
template <Divergence kKind>
struct DivergenceTraits;

// KL(teacher || student).
template <>
struct DivergenceTraits<Divergence::forward> {
  static constexpr bool kStudentIsP = false;  // else p is the teacher, and q the student
  static constexpr bool kIsKl = true;         // the loss is KL(p || q), from the sums of the first pass
};

// KL(student || teacher).
template <>
struct DivergenceTraits<Divergence::reverse> {
  static constexpr bool kStudentIsP = true;
  static constexpr bool kIsKl = true;
};

// beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student. Takes a second pass.
template <>
struct DivergenceTraits<Divergence::jsd> {
  static constexpr bool kStudentIsP = false;
  static constexpr bool kIsKl = false;
};

// The maximum that is subtracted, 0 if there is no vocabulary entry yet.
__device__ __forceinline__ float base_of(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// D of a vocabulary entry, from its logits and q_base - p_base. 0 if both logits are -inf.
__device__ __forceinline__ float difference_of(float p, float q, float base_difference, float scale) {
  return p == -kInfinity && q == -kInfinity ? 0.0f : ((q - p) - base_difference) * scale;
}

template <Divergence kKind>
struct RowSums {
  float p_max = -kInfinity, q_max = -kInfinity;
  float p_sum = 0, q_sum = 0;  // of e_p, e_q
  float change_sum = 0;        // of e_q - e_p
  float excess_sum = 0;        // of e_q - e_p - e_p D
  float difference_sum = 0;    // of e_p D

  // Rescales all sums to new maxima.
  __device__ __forceinline__ void rescale(float new_p_max, float new_q_max, float scale) {
    const float p_base = base_of(new_p_max), q_base = base_of(new_q_max);
    const float fp = p_max == -kInfinity ? 0.0f : exp_fast((p_max - p_base) * scale);
    const float fq = q_max == -kInfinity ? 0.0f : exp_fast((q_max - q_base) * scale);
    const float a = ((q_base - p_base) - (base_of(q_max) - base_of(p_max))) * scale;
    const bool close = fabsf(a) <= 1 && p_max > -kInfinity && q_max > -kInfinity;
    const float a_excess = excess_near(-a);
    const float p_to_change = close ? fp * (a_excess - a) : fq - fp;  // f_p expm1(-a)
    if (DivergenceTraits<kKind>::kIsKl) {
      const float p_to_excess = close ? fp * a_excess : p_to_change + fp * a;  // f_p phi(-a)
      if (excess_sum != kInfinity) excess_sum = fp * excess_sum + p_to_change * change_sum + p_to_excess * p_sum;
      difference_sum = fp * (difference_sum - a * p_sum);
    }
    change_sum = fq * change_sum + p_to_change * p_sum;
    p_sum *= fp;
    q_sum *= fq;
    p_max = new_p_max;
    q_max = new_q_max;
  }

  // Rescales if one of these exceeds its maximum so far.
  __device__ __forceinline__ void raise_maxima(float new_p_max, float new_q_max, float scale) {
    if (new_p_max > p_max || new_q_max > q_max) rescale(fmaxf(p_max, new_p_max), fmaxf(q_max, new_q_max), scale);
  }

  // Adds one vocabulary entry. Its logits must not exceed the maxima.
  __device__ __forceinline__ void add(float p, float q, float scale) {
    const float p_base = base_of(p_max), q_base = base_of(q_max);
    const float ep = exp_fast((p - p_base) * scale), eq = exp_fast((q - q_base) * scale);
    const float d = difference_of(p, q, q_base - p_base, scale);
    const bool close = fabsf(d) <= 1;
    const float d_excess = excess_near(d);
    const float change = close ? ep * (d + d_excess) : eq - ep;
    p_sum += ep;
    q_sum += eq;
    change_sum += change;
    if (DivergenceTraits<kKind>::kIsKl) {
      const float weighted_difference = fabsf(d) < kInfinity ? ep * d : 0.0f;
      excess_sum += d == -kInfinity ? kInfinity : close ? ep * d_excess : change - weighted_difference;
      difference_sum += weighted_difference;
    }
  }
};

// l = log m/p_t and r = log p_s/m of delta = log p_s/p_t, with m = beta p_t + (1 - beta) p_s.
__device__ __forceinline__ float2 mixture_of(float delta, float beta) {
  if (fabsf(delta) <= 1) {
    const float log_mixture = log1p_near((1.0f - beta) * (delta + excess_near(delta)));
    return {log_mixture, delta - log_mixture};
  }
  // From the smaller of the two probabilities, which is e^-|delta| times the larger one.
  const float ratio = exp_fast(-fabsf(delta));
  const bool positive = delta > 0;
  const float log_mixture = logf(positive ? (1.0f - beta) + beta * ratio : beta + (1.0f - beta) * ratio);
  return positive ? float2{delta + log_mixture, -log_mixture} : float2{log_mixture, delta - log_mixture};
}

// p x, and 0 if x is infinite: p is 0 there.
__device__ __forceinline__ float product_or_zero(float p, float x) { return fabsf(x) == kInfinity ? 0.0f : p * x; }

}  // namespace softprompt
