// Divergences of a row of logits for which the formulas of `divergence.h` do not hold: p_s and p_t are normalised, and
// every term is written so that infinities come out as what they mean.
//
// With delta = log p_s - log p_t and phi(d) = e^d - 1 - d, which for large d is q - p - p d after the product with p:
//
//     forward  sum p_t phi(delta)                          gradient  p_s - p_t
//     reverse  sum p_s phi(-delta)                         gradient  p_s (delta - KL), 0 where KL is infinite
//     jsd      beta sum p_t phi(log m/p_t) + (1-beta) sum p_s phi(log m/p_s),   m = beta p_t + (1-beta) p_s
//                                                          gradient  (1-beta) p_s (log p_s/m - KL(p_s||m))
//
// A term of probability 0 contributes q, so that both first terms of phi sum to nothing; a finite logit over one of
// -inf makes the divergence +inf, however small its probability. A teacher without any finite
// logit says nothing: loss 0, gradient 0. Such a student has loss +inf, gradient 0. NaN and +inf make NaN of the row.
#pragma once

#include "cpu/losses/divergence.h"

namespace softprompt::SPK_ISA {

// p phi(delta), delta = log q/p.
SPK_INLINE Vec divergence_term(Vec p, Vec q, Vec delta) {
  const IntVec near = delta <= 1.0f;
  const Vec excess = exp_terms(select(near, delta, Vec{})).excess;
  const Vec term = select(p == 0.0f, q, select(near, p * excess, (q - p) - p * delta));
  return select(delta == -kInfinity, splat(kInfinity), term);
}

// The teacher's share beta of the mixture, and the student's.
struct Shares {
  float teacher, student;
  explicit Shares(double beta) : teacher(static_cast<float>(beta)), student(static_cast<float>(1 - beta)) {}
};

// log(rest + share e^delta), share + rest = 1, accurate near 0 and safe for large delta.
SPK_INLINE Vec log_mixture(Vec delta, float share, float rest) {
  const IntVec near = delta <= 1.0f;
  const Vec below = log1p(share * expm1(select(near, delta, splat(1.0f))));
  const Vec above = delta + log(share + rest * exp(-max(delta, Vec{})));
  return select(near, below, above);
}

struct FarRow {
  Row row;
  float student_max, teacher_max;  // 0 where there is no finite logit
  float student_scale, teacher_scale;  // 1 / sum of the exponentials
  float log_ratio;                     // log of the ratio of these sums
};

struct FarPoint {
  Vec p_s, p_t, delta;
};
SPK_INLINE FarPoint point_of(const FarRow& far, Vec student, Vec teacher) {
  const float scale = far.row.inverse_temperature;
  // Differences before normalisers: close logits lose no digits.
  const Vec delta = ((student - teacher) - (far.student_max - far.teacher_max)) * scale - far.log_ratio;
  return {exp((student - far.student_max) * scale) * far.student_scale,
          exp((teacher - far.teacher_max) * scale) * far.teacher_scale, delta};
}

SPK_INLINE double sum_of_exponentials(const float* logits, int64_t vocab, float largest, float scale) {
  double total = 0;
  sum_blocks(vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec totals = {};
    for_each_vector(logits, begin, end,
          [&](int64_t, Vec z, int) __attribute__((always_inline)) { totals += exp((z - largest) * scale); });
    total += sum_lanes(totals);
  });
  return total;
}

template <Divergence kind>
SPK_INLINE Vec far_loss(const FarPoint& at, const Shares& shares) {
  if (kind == Divergence::forward) return divergence_term(at.p_t, at.p_s, at.delta);
  if (kind == Divergence::reverse) return divergence_term(at.p_s, at.p_t, -at.delta);
  const Vec m = shares.teacher * at.p_t + shares.student * at.p_s;
  return shares.teacher * divergence_term(at.p_t, m, log_mixture(at.delta, shares.student, shares.teacher));
}

SPK_INLINE Vec far_student_cost(const FarPoint& at, const Shares& shares) {  // of jsd: the terms of KL(p_s||m)
  const Vec m = shares.teacher * at.p_t + shares.student * at.p_s;
  return divergence_term(at.p_s, m, log_mixture(-at.delta, shares.teacher, shares.student));
}

template <Divergence kind>
SPK_INLINE Vec far_gradient(const FarPoint& at, const Shares& shares, float cost) {
  Vec gradient = at.p_s - at.p_t;
  if (kind == Divergence::reverse) gradient = at.p_s * (at.delta - cost);
  if (kind == Divergence::jsd) {
    gradient = shares.student * at.p_s * (-log_mixture(-at.delta, shares.teacher, shares.student) - cost);
  }
  return kind == Divergence::forward ? gradient : select(at.p_s == 0.0f, Vec{}, gradient);
}

// The gradient is left in `weight`, with 1 as its value. (`value` may be `student`: it is written after it was read.)
static void fill_gradient(const Row& row, float gradient) {
  for (int64_t i = 0; i < row.vocab; ++i) row.weight[i] = gradient;
  for (int64_t i = 0; i < row.vocab; ++i) row.value[i] = 1.0f;
}

template <Divergence kind>
static RowResult far_divergence(const Row& row, Want want) {
  FarRow far = {row, row_max(row.student, row.vocab), row_max(row.teacher, row.vocab), 0, 0, 0};
  const bool no_student = far.student_max == -kInfinity, no_teacher = far.teacher_max == -kInfinity;
  if (no_student) far.student_max = 0;
  if (no_teacher) far.teacher_max = 0;
  const float scale = row.inverse_temperature;
  const double student_sum = sum_of_exponentials(row.student, row.vocab, far.student_max, scale);
  const double teacher_sum = sum_of_exponentials(row.teacher, row.vocab, far.teacher_max, scale);
  const bool undefined = !(student_sum < kInfinity && teacher_sum < kInfinity) || far.student_max == kInfinity ||
                         far.teacher_max == kInfinity;
  if (undefined || no_student || no_teacher) {
    const float nan = __builtin_nanf("");
    if (want != Want::loss) fill_gradient(row, undefined ? nan : 0.0f);
    return {undefined ? nan : no_teacher ? 0.0f : kInfinity, 0, 1, false};
  }
  far.student_scale = static_cast<float>(1 / student_sum);
  far.teacher_scale = static_cast<float>(1 / teacher_sum);
  far.log_ratio = static_cast<float>(__builtin_log(student_sum / teacher_sum));

  const Shares shares(row.beta);
  double loss = 0, student_cost = 0;
  sum_blocks(row.vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec losses = {}, costs = {};
    for_each_vector(row.student, row.teacher, begin, end,
          [&](int64_t, Vec student, Vec teacher, int) __attribute__((always_inline)) {
            const FarPoint at = point_of(far, student, teacher);
            losses += far_loss<kind>(at, shares);
            if (kind == Divergence::jsd) costs += far_student_cost(at, shares);
          });
    loss += sum_lanes(losses);
    student_cost += sum_lanes(costs);
  });
  loss += (1 - row.beta) * student_cost;
  if (want == Want::loss) return {not_negative(loss), 0, 1, false};
  if (kind == Divergence::reverse && loss == kInfinity) {
    fill_gradient(row, 0);
    return {kInfinity, 0, 1, false};
  }
  const float cost = static_cast<float>(kind == Divergence::jsd ? student_cost : loss);
  for_each_vector(row.student, row.teacher, 0, row.vocab,
        [&](int64_t i, Vec student, Vec teacher, int count) __attribute__((always_inline)) {
          Vec gradient = far_gradient<kind>(point_of(far, student, teacher), shares, cost);
          if (want == Want::capped_gradient) gradient *= slope_of_tanh(row, student);
          store_n(row.weight + i, gradient, count);
          store_n(row.value + i, splat(1.0f), count);
        });
  return {not_negative(loss), 0, 1, false};
}

}  // namespace softprompt::SPK_ISA
