// Divergences of a row of logits z_s and z_t, and their gradients by z_s, from exponentials that are not normalised.
//
// For KL(p||q), with e = exp(z_p - max z_p), S = sum e, and D = (z_q - max z_q) - (z_p - max z_p):
//
//     E = E_p[e^D - 1],   X = E_p[e^D - 1 - D],   KL = X + (log1p(E) - E),   q - p = e expm1(D - L) / S,   L = log1p(E)
//
// keeps the relative accuracy as q goes to p: both terms of the loss are of the size of D^2, and e^D - 1 and
// e^D - 1 - D are computed as such. Where the maxima centre D badly, |E| is large and the terms cancel; then
//
//     L = log(sum e e^D / S),   KL = L - E_p[D]
//
// It takes a sweep for the maxima, one with two exponentials an element for the sums, and one for the gradient:
//
//     forward  KL(p_t||p_s), p = t      gradient  e expm1(D - L) / S
//     reverse  KL(p_s||p_t), p = s      gradient  -e (D - E_s[D]) / S
//     jsd      p = t, delta = D - L = log p_s/p_t, l = log1p((1-beta) expm1(delta)) = log m/p_t, r = delta - l:
//              (1-beta) E_s[r] - beta E_t[l]      gradient  (1-beta) e e^delta (r - E_s[r]) / S
//
// Each gradient has the form  scale * weight * f(value - centre),  f being expm1 or nothing, with the centre and scale
// of a row known only when all of it was seen.
//
// That needs D to be finite and at most kMaxDifference, or e * e^D meets the ends of the fp32 range. Other rows, with
// logits of -inf on one side, NaN, or sides that have nothing in common, go to `divergence_fallback.h`. Logits of -inf on
// both sides are words that do not exist: e is 0 and D counts as 0.
#pragma once

#include "cpu/platform/row_reductions.h"
#include "tensor.h"

namespace softprompt::SPK_ISA {

// e^48 times the smallest normal fp32, 1.2e-38, is 1e-17: what underflow takes from e * e^D is nothing.
constexpr float kMaxDifference = 48.0f;

struct Row {
  const float* student;  // [vocab]
  const float* teacher;
  float* weight;  // [vocab], of the gradient; may be `student` or `teacher`
  float* value;
  int64_t vocab;
  float inverse_temperature;  // the logits are to be multiplied by it
  float inverse_softcap;      // student * inverse_softcap is a tanh, whose derivative goes into the gradient
  double beta;
  PrefetchRow ahead[2];  // the rows that come next, or these if they are the last
};

struct RowResult {
  float loss;
  float centre, scale;  // of the gradient
  bool grows;           // f is expm1
};

enum class Want { loss, gradient, capped_gradient };

SPK_INLINE Vec slope_of_tanh(const Row& row, Vec student) {
  const Vec tanh = student * row.inverse_softcap;
  return 1.0f - tanh * tanh;
}

// Which side weighs (p) and which is compared with it (q).
template <Divergence kind>
struct Sides {
  const float *p, *q;
  SPK_INLINE Sides of(const Row& row) {
    return kind == Divergence::reverse ? Sides{row.student, row.teacher} : Sides{row.teacher, row.student};
  }
};

struct Centre {
  float p_max;
  float shift;  // max z_q - max z_p
  bool near;    // the formulas above hold
};

template <Divergence kind>
static Centre find_centre(const Row& row) {
  const Sides<kind> sides = Sides<kind>::of(row);
  const Vec none = splat(-kInfinity);
  Vec p_max = none, q_max = none, difference = none;
  IntVec bad = {};
  for_each_vector(sides.p, sides.q, 0, row.vocab, [&](int64_t, Vec zp, Vec zq, int) __attribute__((always_inline)) {
    const Vec d = zq - zp;
    p_max = max(zp, p_max);
    q_max = max(zq, q_max);
    difference = max(d, difference);
    bad |= ~(d > none) & (max(zp, zq) != none);  // -inf or NaN, and not of -inf on both sides
  });
  const float largest_p = max_lanes(p_max), shift = max_lanes(q_max) - largest_p;
  const float largest = (max_lanes(difference) - shift) * row.inverse_temperature;
  return {largest_p, shift, largest_p > -kInfinity && largest <= kMaxDifference && !any_lane(bad)};
}

struct Weigh {  // one element: e and D
  const float p_max, shift, scale, scale2;
  SPK_INLINE Weigh at(const Row& row, const Centre& centre) {
    return {centre.p_max, centre.shift, row.inverse_temperature, row.inverse_temperature * kLog2E};
  }
};
SPK_INLINE Vec weight_of(const Weigh& w, Vec zp) { return exp2((zp - w.p_max) * w.scale2); }
SPK_INLINE Vec difference_of(const Weigh& w, Vec zp, Vec zq) {
  const Vec d = ((zq - zp) - w.shift) * w.scale;
  return d == d ? d : Vec{};  // NaN is -inf on both sides
}

struct Sums {
  double total;           // S
  double change, excess;  // E, X
  double difference;      // E_p[D]
  double log_ratio;       // L
  bool centred;           // |E| is small
};

// The sums; where a gradient of KL is wanted, its weight and value too.
template <Divergence kind, Want want>
SPK_INLINE Sums sum_differences(const Row& row, const Centre& centre) {
  const Sides<kind> sides = Sides<kind>::of(row);
  const Weigh w = Weigh::at(row, centre);
  double total = 0, other = 0, change = 0, excess = 0, difference = 0;
  sum_blocks(row.vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec totals = {}, others = {}, changes = {}, excesses = {}, differences = {};
    for_each_vector(sides.p, sides.q, begin, end,
                    [&](int64_t i, Vec zp, Vec zq, int count) __attribute__((always_inline)) {
      prefetch(row.ahead[0], i);
      prefetch(row.ahead[1], i);
      const Vec e = weight_of(w, zp), d = difference_of(w, zp, zq);
      const ExpTerms g = exp_terms(d);
      totals += e;
      others += e * g.factor;
      changes += e * g.change;
      excesses += e * g.excess;
      differences += e * d;
      if constexpr (want != Want::loss) {
        const Vec student = kind == Divergence::reverse ? zp : zq;
        store_n(row.weight + i, want == Want::capped_gradient ? e * slope_of_tanh(row, student) : e, count);
        store_n(row.value + i, d, count);
      }
    });
    total += sum_lanes(totals);
    other += sum_lanes(others);
    change += sum_lanes(changes);
    excess += sum_lanes(excesses);
    difference += sum_lanes(differences);
  });
  change /= total;
  const bool centred = change > -0.5 && change < 0.5;
  const double log_ratio = centred ? __builtin_log1p(change) : __builtin_log(other / total);
  return {total, change, excess / total, difference / total, log_ratio, centred};
}

SPK_INLINE float not_negative(double loss) { return static_cast<float>(loss < 0 ? 0 : loss); }  // rounding can say < 0

template <Divergence kind, Want want>
static RowResult near_kl(const Row& row, const Centre& centre) {
  const Sums s = sum_differences<kind, want>(row, centre);
  const float loss = not_negative(s.centred ? s.excess + (s.log_ratio - s.change) : s.log_ratio - s.difference);
  if (kind == Divergence::reverse) {
    return {loss, static_cast<float>(s.difference), static_cast<float>(-1 / s.total), false};
  }
  return {loss, static_cast<float>(s.log_ratio), static_cast<float>(1 / s.total), true};
}

template <Want want>
static RowResult near_jsd(const Row& row, const Centre& centre) {
  const Sums s = sum_differences<Divergence::jsd, Want::loss>(row, centre);
  const Weigh w = Weigh::at(row, centre);
  const float normaliser = static_cast<float>(s.log_ratio), share = static_cast<float>(1 - row.beta);
  double student_cost = 0, teacher_cost = 0;  // E_s[r], E_t[l]
  sum_blocks(row.vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec students = {}, teachers = {};
    for_each_vector(row.teacher, row.student, begin, end,
          [&](int64_t i, Vec teacher, Vec student, int count) __attribute__((always_inline)) {
            const Vec delta = difference_of(w, teacher, student) - normaliser;
            const ExpTerms g = exp_terms(delta);
            const Vec mixture = log1p(share * g.change);  // l
            const Vec ratio = delta - mixture;            // r
            const Vec e_t = weight_of(w, teacher), e_s = e_t * g.factor;
            students += e_s * ratio;
            teachers += e_t * mixture;
            if constexpr (want != Want::loss) {
              store_n(row.weight + i, want == Want::capped_gradient ? e_s * slope_of_tanh(row, student) : e_s, count);
              store_n(row.value + i, ratio, count);
            }
          });
    student_cost += sum_lanes(students);
    teacher_cost += sum_lanes(teachers);
  });
  student_cost /= s.total;
  teacher_cost /= s.total;
  const float loss = not_negative((1 - row.beta) * student_cost - row.beta * teacher_cost);
  return {loss, static_cast<float>(student_cost), static_cast<float>(share / s.total), false};
}

}  // namespace softprompt::SPK_ISA
