// Divergences of a row of logits for which the formulas of `divergence.h` do not hold. Here p_s and p_t are normalised,
// and infinite logits give the value that they mean.
//
// With delta = log p_s - log p_t and phi(d) = e^d - 1 - d:
//
//     forward  sum p_t phi(delta)                          gradient  p_s - p_t
//     reverse  sum p_s phi(-delta)                         gradient  p_s (delta - KL), 0 where KL is infinite
//     jsd      beta sum p_t phi(log m/p_t) + (1-beta) sum p_s phi(log m/p_s),   m = beta p_t + (1-beta) p_s
//                                                          gradient  (1-beta) p_s (log p_s/m - KL(p_s||m))
//
// For large d = log q/p, p phi(d) is computed as q - p - p d. A vocabulary entry with p = 0 contributes q, so that the
// terms q - p of all entries add up to 0. A finite logit of p over a logit -inf of q makes the divergence +inf, however
// small the probability is.
//
// A teacher without a finite logit gives loss 0 and gradient 0. A student without one gives loss +inf and gradient 0.
// NaN and +inf make the whole row NaN.
#pragma once

#include "cpu/losses/divergence.h"

namespace softprompt::SPK_ISA {

// p phi(delta), delta = log q/p.
SPK_INLINE Vec divergence_term(Vec p, Vec q, Vec delta) {
  const IntVec small = delta <= 1.0f;
  const Vec excess = exp_terms(select(small, delta, Vec{})).excess;
  const Vec term = select(p == 0.0f, q, select(small, p * excess, (q - p) - p * delta));
  return select(delta == -kInfinity, splat(kInfinity), term);
}

// The teacher's share of the mixture, beta, and the student's, 1 - beta.
struct Shares {
  float teacher, student;
  explicit Shares(double beta) : teacher(static_cast<float>(beta)), student(static_cast<float>(1 - beta)) {}
};

// log(rest + share e^delta), share + rest = 1, accurate near 0 and safe for large delta.
SPK_INLINE Vec log_mixture(Vec delta, float share, float rest) {
  const IntVec small = delta <= 1.0f;
  const Vec for_small = log1p(share * expm1(select(small, delta, splat(1.0f))));
  const Vec for_large = delta + log(share + rest * exp(-max(delta, Vec{})));
  return select(small, for_small, for_large);
}

struct Normalisers {
  float student_max, teacher_max;      // 0 where there is no finite logit
  float student_scale, teacher_scale;  // 1 / sum of the exponentials
  float log_ratio;                     // log of the student's sum over the teacher's
  float scale;                         // multiplies the logits
};

struct Probabilities {
  Vec p_s, p_t, delta;
};
SPK_INLINE Probabilities probabilities_of(const Normalisers& by, Vec student, Vec teacher) {
  // The logits are subtracted before the normalisers: so the difference of close logits loses no digits.
  const Vec delta = ((student - teacher) - (by.student_max - by.teacher_max)) * by.scale - by.log_ratio;
  return {exp((student - by.student_max) * by.scale) * by.student_scale,
          exp((teacher - by.teacher_max) * by.scale) * by.teacher_scale, delta};
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

// The terms of the loss; for jsd those of KL(p_t||m) alone, times beta.
template <Divergence kind>
SPK_INLINE Vec loss_term(const Probabilities& at, const Shares& shares) {
  if constexpr (kind == Divergence::forward) {
    return divergence_term(at.p_t, at.p_s, at.delta);
  } else if constexpr (kind == Divergence::reverse) {
    return divergence_term(at.p_s, at.p_t, -at.delta);
  } else if constexpr (kind == Divergence::jsd) {
    const Vec m = shares.teacher * at.p_t + shares.student * at.p_s;
    return shares.teacher * divergence_term(at.p_t, m, log_mixture(at.delta, shares.student, shares.teacher));
  } else {
    static_assert(kAlwaysFalse<kind>, "the loss of this divergence?");
  }
}

// For jsd, the terms of KL(p_s||m).
SPK_INLINE Vec student_term(const Probabilities& at, const Shares& shares) {
  const Vec m = shares.teacher * at.p_t + shares.student * at.p_s;
  return divergence_term(at.p_s, m, log_mixture(-at.delta, shares.teacher, shares.student));
}

// `mean` is the KL for reverse, and KL(p_s||m) for jsd.
template <Divergence kind>
SPK_INLINE Vec gradient_term(const Probabilities& at, const Shares& shares, float mean) {
  if constexpr (kind == Divergence::forward) {
    return at.p_s - at.p_t;
  } else if constexpr (kind == Divergence::reverse) {
    return select(at.p_s == 0.0f, Vec{}, at.p_s * (at.delta - mean));
  } else if constexpr (kind == Divergence::jsd) {
    const Vec log_ratio = -log_mixture(-at.delta, shares.teacher, shares.student);  // log p_s/m
    return select(at.p_s == 0.0f, Vec{}, shares.student * at.p_s * (log_ratio - mean));
  } else {
    static_assert(kAlwaysFalse<kind>, "the gradient of this divergence?");
  }
}

// The gradient goes into `weight`, with 1 as `value`.
static void fill_gradient(const Row& row, float gradient) {
  for (int64_t i = 0; i < row.vocab; ++i) row.weight[i] = gradient;
  for (int64_t i = 0; i < row.vocab; ++i) row.value[i] = 1.0f;
}

template <Divergence kind>
static RowResult fallback_divergence(const Row& row, Want want) {
  Normalisers by = {row_max(row.student, row.vocab), row_max(row.teacher, row.vocab), 0, 0, 0,
                    row.inverse_temperature};
  const bool no_student = by.student_max == -kInfinity, no_teacher = by.teacher_max == -kInfinity;
  if (no_student) by.student_max = 0;
  if (no_teacher) by.teacher_max = 0;
  const double student_sum = sum_of_exponentials(row.student, row.vocab, by.student_max, by.scale);
  const double teacher_sum = sum_of_exponentials(row.teacher, row.vocab, by.teacher_max, by.scale);
  const bool undefined = !(student_sum < kInfinity && teacher_sum < kInfinity) || by.student_max == kInfinity ||
                         by.teacher_max == kInfinity;
  if (undefined || no_student || no_teacher) {
    const float nan = __builtin_nanf("");
    if (want != Want::loss) fill_gradient(row, undefined ? nan : 0.0f);
    return {undefined ? nan : no_teacher ? 0.0f : kInfinity, 0, 1, false};
  }
  by.student_scale = static_cast<float>(1 / student_sum);
  by.teacher_scale = static_cast<float>(1 / teacher_sum);
  by.log_ratio = static_cast<float>(__builtin_log(student_sum / teacher_sum));

  const Shares shares(row.beta);
  double loss = 0, student_kl = 0;  // KL(p_s||m) of jsd
  sum_blocks(row.vocab, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec losses = {}, student_kls = {};
    for_each_vector(row.student, row.teacher, begin, end,
          [&](int64_t, Vec student, Vec teacher, int) __attribute__((always_inline)) {
            const Probabilities at = probabilities_of(by, student, teacher);
            losses += loss_term<kind>(at, shares);
            if constexpr (kind == Divergence::jsd) student_kls += student_term(at, shares);
          });
    loss += sum_lanes(losses);
    student_kl += sum_lanes(student_kls);
  });
  loss += (1 - row.beta) * student_kl;
  if (want == Want::loss) return {not_negative(loss), 0, 1, false};
  if (kind == Divergence::reverse && loss == kInfinity) {
    fill_gradient(row, 0);
    return {kInfinity, 0, 1, false};
  }
  const float mean = static_cast<float>(kind == Divergence::jsd ? student_kl : loss);
  for_each_vector(row.student, row.teacher, 0, row.vocab,
        [&](int64_t i, Vec student, Vec teacher, int count) __attribute__((always_inline)) {
          Vec gradient = gradient_term<kind>(probabilities_of(by, student, teacher), shares, mean);
          if (want == Want::capped_gradient) gradient *= slope_of_tanh(row, student);
          store_n(row.weight + i, gradient, count);
          store_n(row.value + i, splat(1.0f), count);
        });
  return {not_negative(loss), 0, 1, false};
}

}  // namespace softprompt::SPK_ISA
