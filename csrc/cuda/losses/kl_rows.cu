// Divergence of rows of logits, a block for each row: loss, and gradient by the student.
//
//     kind     p, q  loss                      d loss / d z_s
//     forward  t, s  KL                        e_t expm1(delta) / S
//     reverse  s, t  KL                        -e_s (D - E_s[D]) / S
//     jsd      t, s  (1-b) E_s[r] - b E_t[l]   (1-b) p_s (r - E_s[r])       l = log m/p_t, r = log p_s/m = delta - l
//
// Notation and the way to sum as in kl_sums.cuh. Logits of -inf: a word that no side has counts as nothing; one that only
// p has makes KL infinite (jsd is bounded), one that only q has adds e_q. No teacher word at all: loss 0, gradient 0; no
// student word: loss +inf, gradient 0. Rows of weight 0 are not read.
//
// Sweeps over a row:
//
//     loss alone                  1 read of both                       jsd 2
//     loss and gradient           2 reads of both, 1 write             jsd 3 reads
//     gradient from statistics    1 read of both, 1 write
//
// The later ones run backwards, to find in the L2 cache what the one before saw last.
#include "cuda/arch.cuh"
#include "cuda/block_reduce.cuh"
#include "cuda/losses/kl.h"
#include "cuda/losses/kl_sums.cuh"
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"

namespace softprompt {
namespace {

// Small blocks: 71 registers a thread are 7 of them a multiprocessor of sm_80, and 168, which sm_100 and sm_120 would
// rather have, 3.
constexpr int kThreads = 128, kLeastBlocks = 3;

// What a gradient is computed from; `kStatistics` of them are kept.
struct Measured {
  float p_base, q_base;
  float centre;        // L; E_s[D] for the reverse KL
  float normaliser;    // 1 / S; 0: no gradient
  float student_cost;  // E_s[r], for jsd
};

// Both sides of a row, cut into groups alike.
template <Divergence kKind>
struct Sides {
  const DivergenceRows& call;
  NumberRow student, teacher, student_bias, teacher_bias;
  int shift;  // of the groups' beginning before the row's

  __device__ __forceinline__ Sides(const DivergenceRows& call_, int64_t row)
      : call(call_),
        student(call.student.data, call.student.dtype, row, call.student.stride, call.student.column_stride),
        teacher(call.teacher.data, call.teacher.dtype, row, call.teacher.stride, call.teacher.column_stride),
        student_bias(call.student.bias, Dtype::float32, 0, 0, 1),
        teacher_bias(call.teacher.bias, Dtype::float32, 0, 0, 1) {
    shift = student.wanted_shift();
    for (NumberRow* each : {&student, &teacher, &student_bias, &teacher_bias}) each->cut(shift);
  }

  __device__ __forceinline__ int64_t groups(int64_t columns) const { return (columns + shift + kGroup - 1) / kGroup; }
  __device__ __forceinline__ int64_t first_of(int64_t group) const { return group * kGroup - shift; }

  // z_p and z_q of a group, -inf beyond the vocabulary, and the derivative of z_s by what is under its tanh.
  __device__ __forceinline__ void load(int64_t first, float (&p)[kGroup], float (&q)[kGroup],
                                       float (&slope)[kGroup]) const {
    constexpr bool kReverse = kKind == Divergence::reverse;
    load_side(student, student_bias, first, kReverse ? p : q);
    load_side(teacher, teacher_bias, first, kReverse ? q : p);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float z = kReverse ? p[i] : q[i];
      slope[i] = !call.capped ? 1.0f : z == -kInfinity ? 0.0f : 1.0f - z * z;
    }
  }

 private:
  __device__ __forceinline__ void load_side(const NumberRow& row, const NumberRow& bias, int64_t first,
                                            float (&z)[kGroup]) const {
    row.load(first, call.vocab, 0.0f, z);
    if (bias.data != nullptr) {
      float added[kGroup];
      bias.load(first, call.vocab, 0.0f, added);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) z[i] += added[i];
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t at = first + i;
      if (call.capped) z[i] = tanhf(z[i] * call.inner);
      if (call.negated) z[i] = -z[i];
      if (at < 0 || at >= call.vocab) z[i] = -kInfinity;
    }
  }
};

template <Divergence kKind>
__device__ __forceinline__ RowSums<kKind> sweep_sums(const Sides<kKind>& sides, float scale,
                                                     BlockScratch<5, kThreads>& scratch) {
  RowSums<kKind> sums;
  float p[kGroup], q[kGroup], slope[kGroup];
  const int64_t groups = sides.groups(sides.call.vocab);
  for (int64_t group = threadIdx.x; group < groups; group += kThreads) {
    sides.load(sides.first_of(group), p, q, slope);
    float p_largest = p[0], q_largest = q[0];
#pragma unroll
    for (int i = 1; i < kGroup; ++i) {
      p_largest = fmaxf(p_largest, p[i]);
      q_largest = fmaxf(q_largest, q[i]);
    }
    sums.raise(p_largest, q_largest, scale);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sums.add(p[i], q[i], scale);
  }
  float largest[5] = {sums.p_max, sums.q_max, 0, 0, 0};
  largest_of_block(largest, scratch);
  sums.carry_over(largest[0], largest[1], scale);
  float parts[5] = {sums.total, sums.other, sums.change, sums.excess, sums.difference};
  sum_block(parts, scratch);
  sums.total = parts[0];
  sums.other = parts[1];
  sums.change = parts[2];
  sums.excess = parts[3];
  sums.difference = parts[4];
  return sums;
}

// The JSD, and E_s[r]: a sum of b p_t phi(l) + (1-b) p_s phi(-r), each at least 0.
__device__ __forceinline__ float2 sweep_costs(const Sides<Divergence::jsd>& sides, const Measured& known,
                                              BlockScratch<5, kThreads>& scratch) {
  const float scale = sides.call.scale, beta = sides.call.beta;
  const float student_normaliser = known.normaliser * exp_fast(-known.centre);
  float losses = 0, costs = 0;
  float p[kGroup], q[kGroup], slope[kGroup];
  const int64_t groups = sides.groups(sides.call.vocab);
  for (int64_t group = groups - 1 - threadIdx.x; group >= 0; group -= kThreads) {
    sides.load(sides.first_of(group), p, q, slope);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float teacher = exp_fast((p[i] - known.p_base) * scale) * known.normaliser;
      const float student = exp_fast((q[i] - known.q_base) * scale) * student_normaliser;
      const float delta = difference_of(p[i], q[i], known.q_base - known.p_base, scale) - known.centre;
      const float2 mixture = mixture_of(delta, beta);
      const float cost = weighted(student, mixture.y);
      losses += fabsf(delta) <= 1 ? beta * teacher * excess_near(mixture.x) + (1 - beta) * student * excess_near(-mixture.y)
                                  : (1 - beta) * cost - beta * weighted(teacher, mixture.x);
      costs += cost;
    }
  }
  float parts[5] = {losses, costs, 0, 0, 0};
  sum_block(parts, scratch);
  return {parts[0], parts[1]};
}

template <Divergence kKind>
__device__ __forceinline__ Measured measure(const Sides<kKind>& sides, int64_t row, BlockScratch<5, kThreads>& scratch) {
  const DivergenceRows& call = sides.call;
  const RowSums<kKind> sums = sweep_sums(sides, call.scale, scratch);
  const bool has_p = sums.p_max > -kInfinity || sums.total != 0;  // NaN has neither and counts
  const bool has_q = sums.q_max > -kInfinity || sums.other != 0;
  Measured known = {base_of(sums.p_max), base_of(sums.q_max), 0, 1.0f / (sums.total == 0 ? 1.0f : sums.total), 0};
  const float mean_change = sums.change * known.normaliser;  // E
  const bool centred = fabsf(mean_change) < 0.5f;
  const float log_ratio = centred ? log1p_near(mean_change) : logf(sums.other * known.normaliser);  // L
  float value;
  known.centre = log_ratio;
  if constexpr (kKind == Divergence::jsd) {
    const float2 found = sweep_costs(sides, known, scratch);
    value = found.x;
    known.student_cost = found.y;
  } else {
    const float mean_difference = sums.difference * known.normaliser, mean_excess = sums.excess * known.normaliser;
    value = centred ? mean_excess + log1p_minus(mean_change) : log_ratio - mean_difference;
    if (mean_excess == kInfinity) value = kInfinity;
    if (kKind == Divergence::reverse) known.centre = mean_difference;
  }
  const bool no_teacher = kKind == Divergence::reverse ? !has_q : !has_p;
  const bool no_student = kKind == Divergence::reverse ? !has_p : !has_q;
  if (value < 0) value = 0;  // rounding can say so
  if (no_student) value = kInfinity;
  if (no_teacher) value = 0;
  if (no_teacher || no_student || (kKind == Divergence::reverse && value == kInfinity)) known.normaliser = 0;
  if (threadIdx.x == 0) {
    call.loss[row] = value * call.loss_scale;
    if (call.statistics != nullptr) {
      float* at = call.statistics + row * kStatistics;
      at[0] = known.p_base;
      at[1] = known.q_base;
      at[2] = known.centre;
      at[3] = known.normaliser;
      at[4] = known.student_cost;
    }
  }
  return known;
}

template <Divergence kKind>
__device__ __forceinline__ float gradient_of(float p, float q, const Measured& known, float student_normaliser,
                                             float scale, float beta) {
  const float d = difference_of(p, q, known.q_base - known.p_base, scale);
  const float delta = d - known.centre;
  if constexpr (kKind == Divergence::reverse) {
    return -weighted(exp_fast((p - known.p_base) * scale) * known.normaliser, delta);
  } else {
    const float eq = exp_fast((q - known.q_base) * scale) * student_normaliser;
    if constexpr (kKind == Divergence::forward) {
      const float ep = exp_fast((p - known.p_base) * scale) * known.normaliser;
      return fabsf(delta) <= 1 ? ep * (delta + excess_near(delta)) : eq - ep;
    } else {
      return (1 - beta) * weighted(eq, mixture_of(delta, beta).y - known.student_cost);
    }
  }
}

template <Divergence kKind>
__device__ __forceinline__ void write_gradient(const Sides<kKind>& sides, int64_t row, const Measured& known, bool kept) {
  const DivergenceRows& call = sides.call;
  NumberRow out(call.gradient, call.gradient_dtype, row, call.gradient_stride, 1);
  out.cut(sides.shift);
  float factor = call.gradient_scale;
  if (kept && call.row_scale != nullptr) factor *= call.row_scale[row];
  // What goes into a product stays finite: none is so large but where the reverse KL is in the hundreds.
  const bool clamped = call.gradient_dtype == Dtype::float16 && call.row_scale == nullptr;
  const bool nothing = !kept || known.normaliser == 0;
  const float student_normaliser = known.normaliser * exp_fast(-known.centre);
  float p[kGroup], q[kGroup], slope[kGroup], value[kGroup] = {};
  for (int64_t group = sides.groups(call.columns) - 1 - threadIdx.x; group >= 0; group -= kThreads) {
    const int64_t first = sides.first_of(group);
    if (!nothing) {
      sides.load(first, p, q, slope);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const bool inside = first + i < call.vocab;
        value[i] = gradient_of<kKind>(p[i], q[i], known, student_normaliser, call.scale, call.beta) * factor * slope[i];
        if (!inside) value[i] = 0;
        if (clamped && fabsf(value[i]) > 65504.0f) value[i] = copysignf(65504.0f, value[i]);
      }
    }
    out.store(first, call.columns, value);
  }
}

struct Storage {
  BlockScratch<5, kThreads> scratch;
};

template <Divergence kKind>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    divergence_kernel(const __grid_constant__ DivergenceRows call) {
  auto& shared = arch::shared_storage<Storage>();
  const int64_t row = blockIdx.x;
  const bool kept = call.weights == nullptr || call.weights[row] != 0;
  const Sides<kKind> sides(call, row);
  Measured known = {};
  if (kept && call.loss != nullptr) {
    known = measure(sides, row, shared.scratch);
  } else if (kept) {
    const float* at = call.statistics + row * kStatistics;
    known = {at[0], at[1], at[2], at[3], at[4]};
  } else if (call.loss != nullptr && threadIdx.x == 0) {
    call.loss[row] = 0;
    if (call.statistics != nullptr) {
      for (int i = 0; i < kStatistics; ++i) call.statistics[row * kStatistics + i] = 0;
    }
  }
  if (call.gradient != nullptr) write_gradient(sides, row, known, kept);
}

}  // namespace

void divergence_rows(Divergence kind, const DivergenceRows& call, cudaStream_t stream) {
  const auto go = [&](auto* kernel) {
    launch("divergence_rows", kernel, static_cast<unsigned>(call.rows), kThreads, sizeof(Storage), stream, call);
  };
  switch (kind) {
    case Divergence::forward: return go(divergence_kernel<Divergence::forward>);
    case Divergence::reverse: return go(divergence_kernel<Divergence::reverse>);
    case Divergence::jsd: return go(divergence_kernel<Divergence::jsd>);
  }
}

}  // namespace softprompt
