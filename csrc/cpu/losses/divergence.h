// Divergences of a row of logits z_s and z_t, and their gradients by z_s, from exponentials that are not normalised.
//
// For KL(p||q), with e = exp(z_p - max z_p), S = sum e, and D = (z_q - max z_q) - (z_p - max z_p):
//
//     E = E_p[e^D - 1],   X = E_p[e^D - 1 - D],   KL = X + (log1p(E) - E),   q - p = e expm1(D - L) / S,   L = log1p(E)
//
// These formulas keep their relative accuracy as q goes to p: both terms of the loss are of the size of D^2, and the
// kernels compute e^D - 1 and e^D - 1 - D without cancellation. Where the maxima are far from the normalisers, D is far
// from 0 on average, |E| is large and the terms of the loss cancel. Then
//
//     L = log(sum e e^D / S),   KL = L - E_p[D]
//
// A row takes three passes: one for the maxima, one with two exponentials an element for the sums, and one for the
// gradient.
//
//     forward  KL(p_t||p_s), p = t      gradient  e expm1(D - L) / S
//     reverse  KL(p_s||p_t), p = s      gradient  -e (D - E_s[D]) / S
//     jsd      p = t, delta = D - L = log p_s/p_t, l = log1p((1-beta) expm1(delta)) = log m/p_t, r = delta - l:
//              (1-beta) E_s[r] - beta E_t[l]      gradient  (1-beta) e e^delta (r - E_s[r]) / S
//
// Each gradient has the form  scale * weight * f(value - centre).  f is expm1 for the forward KL and the identity for
// the others. The second pass stores weight and value, but the centre and the scale are known only after it.
//
// All this needs D to be finite and at most kMaxDifference, so that e * e^D stays in the range of fp32. Other rows go
// to `divergence_fallback.h`: rows with a logit of -inf in p or q alone, with NaN, or with an entry that is likely
// under q but next to impossible under p. An entry with logits of -inf in both is absent: its e and its D count as 0.
#pragma once

#include "cpu/platform/row_reductions.h"
#include "tensor.h"

#pragma GCC diagnostic error "-Wswitch"  // a switch over Divergence that misses a kind does not compile

namespace softprompt::SPK_ISA {

// e^48 times the smallest normal fp32 number, 1.2e-38, is 1e-17: so little of e * e^D is lost to underflow.
constexpr float kMaxDifference = 48.0f;

// False for every kind, but only once a template is instantiated: for a static_assert after the last known kind.
template <Divergence kind>
constexpr bool kAlwaysFalse = false;

struct Row {
  const float* student;  // [vocab]
  const float* teacher;  // [vocab]
  float* weight;         // [vocab], of the gradient; may be the logits: each element is written after it was read
  float* value;          // [vocab], of the gradient; may be the logits too
  int64_t vocab;
  float inverse_temperature;  // multiplies the logits
  float inverse_softcap;      // student * inverse_softcap is a tanh, whose derivative goes into the gradient
  double beta;
  PrefetchRow ahead[2];  // the next row of student and teacher to prefetch; this row if it is the last
};

struct RowResult {
  float loss;
  float centre, scale;  // of the gradient
  bool applies_expm1;   // whether f in the gradient is expm1
};

enum class Want { loss, gradient, capped_gradient };

SPK_INLINE Vec slope_of_tanh(const Row& row, Vec student) {
  const Vec tanh = student * row.inverse_softcap;
  return 1.0f - tanh * tanh;
}

// Whether p of KL(p||q) is the student; the teacher is q then. Forward and jsd take the teacher as p.
SPK_INLINE constexpr bool student_is_p(Divergence kind) {
  switch (kind) {
    case Divergence::forward: return false;
    case Divergence::reverse: return true;
    case Divergence::jsd: return false;
  }
  __builtin_trap();
}

template <Divergence kind>
struct Operands {
  const float *p, *q;  // logits
  SPK_INLINE Operands of(const Row& row) {
    return student_is_p(kind) ? Operands{row.student, row.teacher} : Operands{row.teacher, row.student};
  }
};

struct RowMaxima {
  float p_max;
  float shift;         // max z_q - max z_p
  bool formulas_hold;  // D is finite and at most kMaxDifference
};

template <Divergence kind>
static RowMaxima find_maxima(const Row& row) {
  const Operands<kind> logits = Operands<kind>::of(row);
  const Vec none = splat(-kInfinity);
  Vec p_max = none, q_max = none, max_difference = none;
  IntVec undefined = {};
  for_each_vector(logits.p, logits.q, 0, row.vocab, [&](int64_t, Vec zp, Vec zq, int) __attribute__((always_inline)) {
    const Vec difference = zq - zp;
    p_max = max(zp, p_max);
    q_max = max(zq, q_max);
    max_difference = max(difference, max_difference);
    undefined |= ~(difference > none) & (max(zp, zq) != none);  // -inf or NaN, and not -inf on both sides
  });
  const float largest_p = max_lanes(p_max), shift = max_lanes(q_max) - largest_p;
  const float largest = (max_lanes(max_difference) - shift) * row.inverse_temperature;
  return {largest_p, shift, largest_p > -kInfinity && largest <= kMaxDifference && !any_lane(undefined)};
}

// e and D of one element.
struct Centring {
  const float p_max, shift, scale, scale_log2e;
  SPK_INLINE Centring of(const Row& row, const RowMaxima& maxima) {
    return {maxima.p_max, maxima.shift, row.inverse_temperature, row.inverse_temperature * kLog2E};
  }
};
SPK_INLINE Vec exponential_of(const Centring& by, Vec zp) { return exp2((zp - by.p_max) * by.scale_log2e); }
SPK_INLINE Vec difference_of(const Centring& by, Vec zp, Vec zq) {
  const Vec d = ((zq - zp) - by.shift) * by.scale;
  return d == d ? d : Vec{};  // NaN: -inf on both sides
}

struct DifferenceSums {
  double p_sum;            // S
  double mean_expm1;       // E
  double mean_excess;      // X
  double mean_difference;  // E_p[D]
  double log_ratio;        // L
  bool centred;            // |E| is small
};

// The second pass. Where the gradient of a KL is wanted, it also stores weight and value.
template <Divergence kind, Want want>
SPK_INLINE DifferenceSums sum_differences(const Row& row, const RowMaxima& maxima) {
  const Operands<kind> logits = Operands<kind>::of(row);
  const Centring by = Centring::of(row, maxima);
  double p_sum = 0, q_sum = 0, expm1_sum = 0, excess_sum = 0, difference_sum = 0;
  sum_blocks(row.vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec p_sums = {}, q_sums = {}, expm1_sums = {}, excess_sums = {}, difference_sums = {};
    const auto add = [&](int64_t i, Vec zp, Vec zq, int count) __attribute__((always_inline)) {
      prefetch(row.ahead[0], i);
      prefetch(row.ahead[1], i);
      const Vec e = exponential_of(by, zp), d = difference_of(by, zp, zq);
      const ExpTerms g = exp_terms(d);
      p_sums += e;
      q_sums += e * g.factor;
      expm1_sums += e * g.change;
      excess_sums += e * g.excess;
      difference_sums += e * d;
      if constexpr (want != Want::loss) {
        const Vec student = student_is_p(kind) ? zp : zq;
        store_n(row.weight + i, want == Want::capped_gradient ? e * slope_of_tanh(row, student) : e, count);
        store_n(row.value + i, d, count);
      }
    };
    for_each_vector(logits.p, logits.q, begin, end, add);
    p_sum += sum_lanes(p_sums);
    q_sum += sum_lanes(q_sums);
    expm1_sum += sum_lanes(expm1_sums);
    excess_sum += sum_lanes(excess_sums);
    difference_sum += sum_lanes(difference_sums);
  });
  const double mean_expm1 = expm1_sum / p_sum;
  const bool centred = mean_expm1 > -0.5 && mean_expm1 < 0.5;
  const double log_ratio = centred ? __builtin_log1p(mean_expm1) : __builtin_log(q_sum / p_sum);
  return {p_sum, mean_expm1, excess_sum / p_sum, difference_sum / p_sum, log_ratio, centred};
}

SPK_INLINE float not_negative(double loss) { return static_cast<float>(loss < 0 ? 0 : loss); }  // rounding can say < 0

template <Divergence kind, Want want>
static RowResult kl_of_row(const Row& row, const RowMaxima& maxima) {
  const DifferenceSums s = sum_differences<kind, want>(row, maxima);
  const float loss =
      not_negative(s.centred ? s.mean_excess + (s.log_ratio - s.mean_expm1) : s.log_ratio - s.mean_difference);
  if constexpr (kind == Divergence::forward) {
    return {loss, static_cast<float>(s.log_ratio), static_cast<float>(1 / s.p_sum), true};
  } else if constexpr (kind == Divergence::reverse) {
    return {loss, static_cast<float>(s.mean_difference), static_cast<float>(-1 / s.p_sum), false};
  } else {
    static_assert(kAlwaysFalse<kind>, "not a KL");
  }
}

template <Want want>
static RowResult jsd_of_row(const Row& row, const RowMaxima& maxima) {
  const DifferenceSums s = sum_differences<Divergence::jsd, Want::loss>(row, maxima);
  const Centring by = Centring::of(row, maxima);
  const float log_ratio = static_cast<float>(s.log_ratio), student_share = static_cast<float>(1 - row.beta);
  double student_sum = 0, teacher_sum = 0;  // S E_s[r] and S E_t[l]
  sum_blocks(row.vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec student_sums = {}, teacher_sums = {};
    for_each_vector(row.teacher, row.student, begin, end,
          [&](int64_t i, Vec teacher, Vec student, int count) __attribute__((always_inline)) {
            const Vec delta = difference_of(by, teacher, student) - log_ratio;
            const ExpTerms g = exp_terms(delta);
            const Vec log_mixture = log1p(student_share * g.change);  // l
            const Vec rest = delta - log_mixture;                     // r
            const Vec e_t = exponential_of(by, teacher), e_s = e_t * g.factor;
            student_sums += e_s * rest;
            teacher_sums += e_t * log_mixture;
            if constexpr (want != Want::loss) {
              store_n(row.weight + i, want == Want::capped_gradient ? e_s * slope_of_tanh(row, student) : e_s, count);
              store_n(row.value + i, rest, count);
            }
          });
    student_sum += sum_lanes(student_sums);
    teacher_sum += sum_lanes(teacher_sums);
  });
  const double student_mean = student_sum / s.p_sum, teacher_mean = teacher_sum / s.p_sum;
  const float loss = not_negative((1 - row.beta) * student_mean - row.beta * teacher_mean);
  return {loss, static_cast<float>(student_mean), static_cast<float>(student_share / s.p_sum), false};
}

}  // namespace softprompt::SPK_ISA
