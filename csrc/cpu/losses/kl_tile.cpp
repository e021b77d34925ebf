// Forward or reverse KL of rows of logits that come a tile of the vocabulary at a time, each tile seen once.
//
// As in `divergence.h`, p is the side that weighs (forward: teacher, reverse: student) and q the other. The maxima and
// normalisers that center the difference there are known only at the end, so every row carries a reference m, the
// largest z_p so far, and a centre c near log(sum exp z_q / sum exp z_p), and what is summed relative to them:
//
//     e = exp(z_p - m),   D = z_q - z_p - c,   S = sum e,   C = sum e (e^D - 1),   X = sum e (e^D - 1 - D),
//     Y = sum e D,   R = sum e e^D
//
// The gradient by z_s is pulled back to hidden states by W before S, C and Y are known, as two sums of which one is
// small where p and q are close:
//
//     forward  U = sum e (e^D - 1) W     reverse  U = sum e D W     both  T = sum e W
//
//     E_q[W] - E_p[W] = (U - (C/S) T) / R             grad KL(p||q), forward
//     E_p[D W] - E_p[D] E_p[W] = (U - (Y/S) T) / S    - grad KL(p||q), reverse
//
// Each term keeps its relative accuracy as q goes to p, whatever constant lies between z_p and z_q. A softcap's tanh'
// goes into both sums, and not into the others. The loss is X/S + log1p(C/S) - C/S, see `divergence.h`.
//
// When m grows to m + log(1/r), everything shrinks by r. When c moves to c - g, D grows by g everywhere:
//
//     forward  U' = e^g U + (e^g - 1) T     reverse  U' = U + g T
//     C' = e^g C + (e^g - 1) S    R' = e^g R    X' = X + (e^g - 1) C + (e^g - 1 - g) S    Y' = Y + g S
//
// These are exact, but of rounded sums: where D is far from 0 for most words, C, X and U are large, and later moves of
// c cancel them. So c must be right before a tile is added, as far as the tile outweighs what came before it. The
// maxima of the tile say how much that is, up to a factor of its size; where its sums say otherwise, it is done again.
//
// It needs what the formulas of `divergence.h` need, D finite and at most kMaxDifference. Rows where that fails are
// left out: they are marked, and give zeros to the sums from then on.
#include "cpu/losses/divergence.h"
#include "cpu/losses/kernels.h"
#include "cpu/losses/kl.h"

namespace softprompt::SPK_ISA {
namespace {

constexpr double kCentred = 0.03;  // c may be off by as much: a move costs a pass over U and T
constexpr double kMostOff = 2;     // R/S or S/R after a tile: more of it costs digits, and the tile is done again

struct Tile {
  const float *p, *q;        // [columns], logits
  float *of_sum, *of_total;  // [columns], what W is weighted by in U and in T; nullptr: no gradient
  int64_t columns;
  float inverse_softcap;
  PrefetchRow ahead[2];  // the rows that come next, or these if they are the last
};

struct Maxima {
  float p, q, difference;
  bool bad;  // -inf on one side, or NaN
};

// Copies the logits, which the weights of the sums will overwrite.
Maxima copy_logits(const float* p, const float* q, int64_t columns, float* p_copy, float* q_copy) {
  const Vec none = splat(-kInfinity);
  Vec p_max = none, q_max = none, difference = none;
  IntVec bad = {};
  for_each_vector(p, q, 0, columns, [&](int64_t i, Vec zp, Vec zq, int count) __attribute__((always_inline)) {
    const Vec d = zq - zp;
    p_max = max(zp, p_max);
    q_max = max(zq, q_max);
    difference = max(d, difference);
    bad |= ~(d > none) & (max(zp, zq) != none);  // see find_centre
    store_n(p_copy + i, zp, count);
    store_n(q_copy + i, zq, count);
  });
  return {max_lanes(p_max), max_lanes(q_max), max_lanes(difference), any_lane(bad)};
}

// What a row of U and of T is, and how it changes: U' = u U + t T, T' = r T.
struct Change {
  double u = 1, t = 0, r = 1;
};

void apply(const Change& change, float* sum, float* total, int64_t size) {
  const float u = static_cast<float>(change.u), t = static_cast<float>(change.t), r = static_cast<float>(change.r);
  for (int64_t i = 0; i < size; ++i) {
    sum[i] = u * sum[i] + t * total[i];
    total[i] *= r;
  }
}

void grow_reference(KlSoFar& row, double reference, Change& change) {
  const double r = __builtin_exp(row.reference - reference);
  row.reference = reference;
  row.total *= r, row.other *= r, row.change *= r, row.excess *= r, row.difference *= r;
  change.u *= r, change.t *= r, change.r *= r;
}

template <Divergence kind>
void move_centre(KlSoFar& row, double centre, Change& change) {
  centre = static_cast<float>(centre);  // as the differences are taken
  const double g = row.centre - centre, growth = __builtin_expm1(g);
  row.centre = centre;
  row.excess += growth * row.change + (growth - g) * row.total;
  row.change += growth * (row.change + row.total);
  row.other += growth * row.other;
  row.difference += g * row.total;
  if (kind == Divergence::forward) {
    change.u += growth * change.u;
    change.t += growth * (change.t + change.r);
  } else {
    change.t += g * change.r;
  }
}

// m and c of a tile with these maxima, and all that was summed before relative to them.
template <Divergence kind>
void choose_reference(KlSoFar& row, const Maxima& maxima, Change& change) {
  if (row.total == 0) {
    row.reference = maxima.p;
    row.centre = maxima.q - maxima.p;
    return;
  }
  if (maxima.p > row.reference) grow_reference(row, maxima.p, change);
  const double p = row.total + __builtin_exp(maxima.p - row.reference);
  const double q = row.other + __builtin_exp(maxima.q - row.centre - row.reference);
  const double off = __builtin_log(q / p);
  if (!(off > -kCentred && off < kCentred)) move_centre<kind>(row, row.centre + off, change);
}

// Adds a tile's sums to those of the row, and writes the weights of its words in U and T.
template <Divergence kind, Want want>
KlSoFar add_tile(KlSoFar row, const Tile& tile) {
  const float reference = static_cast<float>(row.reference), centre = static_cast<float>(row.centre);
  sum_blocks(tile.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec totals = {}, others = {}, changes = {}, excesses = {}, differences = {};
    for_each_vector(tile.p, tile.q, begin, end,
                    [&](int64_t i, Vec zp, Vec zq, int count) __attribute__((always_inline)) {
      prefetch(tile.ahead[0], i);
      prefetch(tile.ahead[1], i);
      const Vec found = (zq - zp) - centre, d = found == found ? found : Vec{};  // NaN is -inf on both sides
      const ExpTerms g = exp_terms(d);
      Vec e = exp2((zp - reference) * kLog2E);
      const Vec change = e * g.change, difference = e * d;
      totals += e;
      others += e * g.factor;
      changes += change;
      excesses += e * g.excess;
      differences += difference;
      if constexpr (want != Want::loss) {
        Vec weight = kind == Divergence::forward ? change : difference;
        if constexpr (want == Want::capped_gradient) {
          const Vec tanh = (kind == Divergence::forward ? zq : zp) * tile.inverse_softcap;
          const Vec slope = 1.0f - tanh * tanh;
          weight *= slope;
          e *= slope;
        }
        store_n(tile.of_sum + i, weight, count);
        store_n(tile.of_total + i, e, count);
      }
    });
    row.total += sum_lanes(totals);
    row.other += sum_lanes(others);
    row.change += sum_lanes(changes);
    row.excess += sum_lanes(excesses);
    row.difference += sum_lanes(differences);
  });
  return row;
}

void fill(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

template <Divergence kind, Want want>
KlSoFar work(KlSoFar row, const Tile& tile, const Maxima& maxima, float* sum, float* total, int64_t size) {
  Change change;
  choose_reference<kind>(row, maxima, change);
  row.left_out = !(maxima.difference - row.centre <= kMaxDifference);
  if (row.left_out) return row;
  KlSoFar after = add_tile<kind, want>(row, tile);
  if (!(after.other < kMostOff * after.total && after.total < kMostOff * after.other)) {
    move_centre<kind>(row, row.centre + __builtin_log(after.other / after.total), change);
    after = add_tile<kind, want>(row, tile);
  }
  const bool changed = change.u != 1 || change.t != 0 || change.r != 1;
  if (want != Want::loss && changed) apply(change, sum, total, size);
  return after;
}

template <Divergence kind>
KlSoFar work(const KlSoFar& row, const Tile& tile, const Maxima& maxima, float* sum, float* total, int64_t size) {
  if (tile.of_sum == nullptr) return work<kind, Want::loss>(row, tile, maxima, sum, total, size);
  if (tile.inverse_softcap == 0) return work<kind, Want::gradient>(row, tile, maxima, sum, total, size);
  return work<kind, Want::capped_gradient>(row, tile, maxima, sum, total, size);
}

}  // namespace

void kl_tile(const KlTile& call, int thread) {
  const bool forward = call.divergence == Divergence::forward, gradient = call.sum != nullptr;
  float* p_logits = call.scratch + 2 * call.columns * thread;
  float* q_logits = p_logits + call.columns;
  const auto [begin, end] = thread_range(call.rows, thread, call.threads);
  for (int64_t index = begin; index < end; ++index) {
    float* student = call.student + index * call.student_stride;
    float* teacher = call.teacher + index * call.teacher_stride;
    KlSoFar& row = call.so_far[index];
    Maxima maxima = {-kInfinity, -kInfinity, -kInfinity, false};
    if (!row.left_out) {
      finish_logits(student, call.student_bias, 1, call.columns, call.softcap);
      finish_logits(teacher, call.teacher_bias, 1, call.columns, call.softcap);
      const float *p = forward ? teacher : student, *q = forward ? student : teacher;
      maxima = copy_logits(p, q, call.columns, p_logits, q_logits);
      row.left_out = maxima.bad;
    }
    const bool empty = maxima.p == -kInfinity && maxima.q == -kInfinity;  // no word that exists
    if (!row.left_out && !empty) {
      const float inverse_softcap = call.softcap > 0 ? 1 / call.softcap : 0;
      const int64_t next = index + 1 < end ? index + 1 : index;
      const Tile tile = {p_logits,
                         q_logits,
                         gradient ? student : nullptr,
                         teacher,
                         call.columns,
                         inverse_softcap,
                         {{reinterpret_cast<const char*>(call.student + next * call.student_stride), sizeof(float)},
                          {reinterpret_cast<const char*>(call.teacher + next * call.teacher_stride), sizeof(float)}}};
      float* sum = gradient ? call.sum + index * call.sum_stride : nullptr;
      float* total = gradient ? call.total + index * call.total_stride : nullptr;
      row = forward ? work<Divergence::forward>(row, tile, maxima, sum, total, call.size)
                    : work<Divergence::reverse>(row, tile, maxima, sum, total, call.size);
    }
    if (gradient && (row.left_out || empty)) {
      fill(student, call.columns);
      fill(teacher, call.columns);
    }
  }
}

}  // namespace softprompt::SPK_ISA
