// Forward or reverse KL of rows of logits that come one tile of the vocabulary at a time. Each tile is seen once.
//
// As in `divergence.h`, the loss is KL(p||q): p is the teacher in the forward KL and the student in the reverse KL.
// There the maxima of a row centre the difference of its logits. Here they are known only after the last tile. So every
// row carries a reference m, the largest z_p so far, and a centre c near log(sum exp z_q / sum exp z_p). Its sums are
// relative to these:
//
//     e = exp(z_p - m),   D = z_q - z_p - c,   S = sum e,   C = sum e (e^D - 1),   X = sum e (e^D - 1 - D),
//     Y = sum e D,   R = sum e e^D
//
// The gradient by z_s must be multiplied by W before S, C and Y are known. So it is kept as two sums over the rows of
// W, of which one is small where p and q are close:
//
//     forward  U = sum e (e^D - 1) W     reverse  U = sum e D W     both  T = sum e W
//
//     E_q[W] - E_p[W] = (U - (C/S) T) / R             grad KL(p||q), forward
//     E_p[D W] - E_p[D] E_p[W] = (U - (Y/S) T) / S    - grad KL(p||q), reverse
//
// Each term keeps its relative accuracy as q goes to p, whatever constant lies between z_p and z_q. A softcap's tanh'
// goes into U and T and into no other sum. The loss is X/S + log1p(C/S) - C/S, see `divergence.h`.
//
// When m grows to m + log(1/r), all sums shrink by r. When c moves to c - g, every D grows by g:
//
//     forward  U' = e^g U + (e^g - 1) T     reverse  U' = U + g T
//     C' = e^g C + (e^g - 1) S    R' = e^g R    X' = X + (e^g - 1) C + (e^g - 1 - g) S    Y' = Y + g S
//
// These updates are exact, but the sums in them are rounded. Where D is far from 0 for most of the vocabulary, C, X and
// U are large, and a later move of c cancels them. So c must be good before a tile is added, the more so the more the
// tile weighs against the tiles before it. The maxima of a tile estimate its sums, up to a factor of its size. If the
// sums then show that c is too far off, c is moved and the tile is added again.
//
// The formulas need D to be finite and at most kMaxDifference, as those of `divergence.h`. A row where that fails is
// marked with `needs_fallback`. From then on it adds zeros to U and T.
#include "cpu/losses/divergence.h"
#include "cpu/losses/kernels.h"
#include "cpu/losses/kl.h"

namespace softprompt::SPK_ISA {
namespace {

constexpr double kCentreTolerance = 0.03;  // c may be off by this much: a move costs a pass over U and T
constexpr double kMaxSumRatio = 2;  // of R to S, either way, after a tile; beyond it digits are lost and c is moved

struct Tile {
  const float *p, *q;      // [columns], logits
  float* gradient_weight;  // [columns], the weights of W's rows in U; nullptr: no gradient
  float* mean_weight;      // [columns], the weights of W's rows in T
  int64_t columns;
  float inverse_softcap;
  PrefetchRow ahead[2];  // the next row of student and teacher to prefetch; this row if it is the last
};

struct TileMaxima {
  float p, q, difference;
  bool undefined;  // a logit of -inf in p or q alone, or NaN
};

// Copies the logits, because the weights of the sums overwrite them, and returns their maxima.
TileMaxima copy_logits(const float* p, const float* q, int64_t columns, float* p_copy, float* q_copy) {
  const Vec none = splat(-kInfinity);
  Vec p_max = none, q_max = none, max_difference = none;
  IntVec undefined = {};
  for_each_vector(p, q, 0, columns, [&](int64_t i, Vec zp, Vec zq, int count) __attribute__((always_inline)) {
    const Vec difference = zq - zp;
    p_max = max(zp, p_max);
    q_max = max(zq, q_max);
    max_difference = max(difference, max_difference);
    undefined |= ~(difference > none) & (max(zp, zq) != none);  // see find_maxima
    store_n(p_copy + i, zp, count);
    store_n(q_copy + i, zq, count);
  });
  return {max_lanes(p_max), max_lanes(q_max), max_lanes(max_difference), any_lane(undefined)};
}

// How a row of U and of T changes with m and c: U' = u U + t T, T' = r T.
struct AccumulatorUpdate {
  double u = 1, t = 0, r = 1;
};

void apply(const AccumulatorUpdate& update, float* gradient_row, float* mean_row, int64_t size) {
  const float u = static_cast<float>(update.u), t = static_cast<float>(update.t), r = static_cast<float>(update.r);
  for (int64_t i = 0; i < size; ++i) {
    gradient_row[i] = u * gradient_row[i] + t * mean_row[i];
    mean_row[i] *= r;
  }
}

void raise_reference(KlTileState& row, double p_max, AccumulatorUpdate& update) {
  const double r = __builtin_exp(row.p_max - p_max);
  row.p_max = p_max;
  row.p_sum *= r, row.q_sum *= r, row.expm1_sum *= r, row.excess_sum *= r, row.difference_sum *= r;
  update.u *= r, update.t *= r, update.r *= r;
}

template <Divergence kind>
void move_centre(KlTileState& row, double centre, AccumulatorUpdate& update) {
  centre = static_cast<float>(centre);  // the precision in which it is subtracted from the logits
  const double g = row.centre - centre, growth = __builtin_expm1(g);
  row.centre = centre;
  row.excess_sum += growth * row.expm1_sum + (growth - g) * row.p_sum;
  row.expm1_sum += growth * (row.expm1_sum + row.p_sum);
  row.q_sum += growth * row.q_sum;
  row.difference_sum += g * row.p_sum;
  if constexpr (kind == Divergence::forward) {
    update.u += growth * update.u;
    update.t += growth * (update.t + update.r);
  } else if constexpr (kind == Divergence::reverse) {
    update.t += g * update.r;
  } else {
    static_assert(kAlwaysFalse<kind>, "U of this divergence?");
  }
}

// Chooses m and c for a tile with these maxima, and makes the sums so far relative to them.
template <Divergence kind>
void choose_reference(KlTileState& row, const TileMaxima& maxima, AccumulatorUpdate& update) {
  if (row.p_sum == 0) {
    row.p_max = maxima.p;
    row.centre = maxima.q - maxima.p;
    return;
  }
  if (maxima.p > row.p_max) raise_reference(row, maxima.p, update);
  const double p = row.p_sum + __builtin_exp(maxima.p - row.p_max);
  const double q = row.q_sum + __builtin_exp(maxima.q - row.centre - row.p_max);
  const double off = __builtin_log(q / p);
  if (!(off > -kCentreTolerance && off < kCentreTolerance)) move_centre<kind>(row, row.centre + off, update);
}

// The state with the sums of a tile added. Writes the weights of the tile's rows of W in U and T.
template <Divergence kind, Want want>
KlTileState sum_tile(KlTileState row, const Tile& tile) {
  const float reference = static_cast<float>(row.p_max), centre = static_cast<float>(row.centre);
  sum_blocks(tile.columns, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    Vec p_sums = {}, q_sums = {}, expm1_sums = {}, excess_sums = {}, difference_sums = {};
    const auto add = [&](int64_t i, Vec zp, Vec zq, int count) __attribute__((always_inline)) {
      prefetch(tile.ahead[0], i);
      prefetch(tile.ahead[1], i);
      const Vec found = (zq - zp) - centre, d = found == found ? found : Vec{};  // NaN: -inf on both sides
      const ExpTerms g = exp_terms(d);
      Vec e = exp2((zp - reference) * kLog2E);
      const Vec e_expm1 = e * g.change, e_difference = e * d;
      p_sums += e;
      q_sums += e * g.factor;
      expm1_sums += e_expm1;
      excess_sums += e * g.excess;
      difference_sums += e_difference;
      if constexpr (want != Want::loss) {
        Vec weight;
        if constexpr (kind == Divergence::forward) {
          weight = e_expm1;
        } else if constexpr (kind == Divergence::reverse) {
          weight = e_difference;
        } else {
          static_assert(kAlwaysFalse<kind>, "U of this divergence?");
        }
        if constexpr (want == Want::capped_gradient) {
          const Vec tanh = (student_is_p(kind) ? zp : zq) * tile.inverse_softcap;
          const Vec slope = 1.0f - tanh * tanh;
          weight *= slope;
          e *= slope;
        }
        store_n(tile.gradient_weight + i, weight, count);
        store_n(tile.mean_weight + i, e, count);
      }
    };
    for_each_vector(tile.p, tile.q, begin, end, add);
    row.p_sum += sum_lanes(p_sums);
    row.q_sum += sum_lanes(q_sums);
    row.expm1_sum += sum_lanes(expm1_sums);
    row.excess_sum += sum_lanes(excess_sums);
    row.difference_sum += sum_lanes(difference_sums);
  });
  return row;
}

void fill(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// The state after a tile. Rescales the row's accumulators to the new m and c.
template <Divergence kind, Want want>
KlTileState add_tile(KlTileState row, const Tile& tile, const TileMaxima& maxima, float* gradient_row, float* mean_row,
                     int64_t size) {
  AccumulatorUpdate update;
  choose_reference<kind>(row, maxima, update);
  row.needs_fallback = !(maxima.difference - row.centre <= kMaxDifference);
  if (row.needs_fallback) return row;
  KlTileState after = sum_tile<kind, want>(row, tile);
  if (!(after.q_sum < kMaxSumRatio * after.p_sum && after.p_sum < kMaxSumRatio * after.q_sum)) {
    move_centre<kind>(row, row.centre + __builtin_log(after.q_sum / after.p_sum), update);
    after = sum_tile<kind, want>(row, tile);
  }
  const bool changed = update.u != 1 || update.t != 0 || update.r != 1;
  if (want != Want::loss && changed) apply(update, gradient_row, mean_row, size);
  return after;
}

template <Divergence kind>
KlTileState add_tile(const KlTileState& row, const Tile& tile, const TileMaxima& maxima, float* gradient_row,
                     float* mean_row, int64_t size) {
  if (tile.gradient_weight == nullptr) {
    return add_tile<kind, Want::loss>(row, tile, maxima, gradient_row, mean_row, size);
  }
  if (tile.inverse_softcap == 0) {
    return add_tile<kind, Want::gradient>(row, tile, maxima, gradient_row, mean_row, size);
  }
  return add_tile<kind, Want::capped_gradient>(row, tile, maxima, gradient_row, mean_row, size);
}

template <Divergence kind>
void kl_tile(const KlTile& call, int thread) {
  const bool gradient = call.gradient_accumulator != nullptr;
  float* p_logits = call.workspace + 2 * call.columns * thread;
  float* q_logits = p_logits + call.columns;
  const auto [begin, end] = thread_range(call.rows, thread, call.threads);
  for (int64_t index = begin; index < end; ++index) {
    float* student = call.student + index * call.student_stride;
    float* teacher = call.teacher + index * call.teacher_stride;
    KlTileState& row = call.state[index];
    TileMaxima maxima = {-kInfinity, -kInfinity, -kInfinity, false};
    if (!row.needs_fallback) {
      finish_logits(student, call.student_bias, 1, call.columns, call.softcap);
      finish_logits(teacher, call.teacher_bias, 1, call.columns, call.softcap);
      const float* p = student_is_p(kind) ? student : teacher;
      const float* q = student_is_p(kind) ? teacher : student;
      maxima = copy_logits(p, q, call.columns, p_logits, q_logits);
      row.needs_fallback = maxima.undefined;
    }
    const bool empty = maxima.p == -kInfinity && maxima.q == -kInfinity;  // every entry is absent
    if (!row.needs_fallback && !empty) {
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
      float* gradient_row = gradient ? call.gradient_accumulator + index * call.gradient_stride : nullptr;
      float* mean_row = gradient ? call.mean_accumulator + index * call.mean_stride : nullptr;
      row = add_tile<kind>(row, tile, maxima, gradient_row, mean_row, call.size);
    }
    if (gradient && (row.needs_fallback || empty)) {
      fill(student, call.columns);
      fill(teacher, call.columns);
    }
  }
}

}  // namespace

void kl_tile(const KlTile& call, int thread) {
  switch (call.divergence) {
    case Divergence::forward: return kl_tile<Divergence::forward>(call, thread);
    case Divergence::reverse: return kl_tile<Divergence::reverse>(call, thread);
    case Divergence::jsd: break;
  }
  __builtin_trap();  // refused before: see run(KlTile)
}

}  // namespace softprompt::SPK_ISA
