// Divergence of rows of logits, one block a row: the loss, and its gradient with respect to the student's logits.
//
//     kind     p, q  loss                      d loss / d z_s
//     forward  t, s  KL                        e_t expm1(delta) / S
//     reverse  s, t  KL                        -e_s (D - E_s[D]) / S
//     jsd      t, s  (1-b) E_s[r] - b E_t[l]   (1-b) p_s (r - E_s[r])       l = log m/p_t, r = log p_s/m = delta - l
//
// t is the teacher, s the student. Notation and summation as in kl_sums.cuh.
//
// Logits of -inf: an entry that is -inf for both adds nothing. One that is -inf only for q makes the KL infinite (jsd
// is bounded). One that is -inf only for p adds e_q. If all teacher logits are -inf, loss and gradient are 0. If all
// student logits are -inf, the loss is +inf and the gradient 0. Rows of weight 0 are not read.
//
// Memory passes over a row:
//
//     loss only                   1 read of both rows                  jsd 2
//     loss and gradient           2 reads of both rows, 1 write        jsd 3 reads
//     gradient from statistics    1 read of both rows, 1 write
//
// Passes after the first run backwards, so that they find the end of the row in the L2 cache.
#include "cuda/arch.cuh"
#include "cuda/block_reduce.cuh"
#include "cuda/launch.h"
#include "cuda/losses/kl.h"
#include "cuda/losses/kl_sums.cuh"
#include "cuda/vector_io.cuh"

#include <stdexcept>
#include <string>

namespace softprompt {
namespace {

// Small blocks: with 71 registers a thread, 7 blocks fit on a multiprocessor of sm_80. With the 168 registers that the
// compiler would like to use on sm_100 and sm_120, 3 blocks fit.
constexpr int kThreads = 128, kMinBlocks = 3;

// What the gradient of a row is computed from. The kStatistics numbers are stored in this order.
struct RowStatistics {
  float p_base, q_base;
  float centre;               // L; E_s[D] for the reverse KL
  float normaliser;           // 1 / S; 0: no gradient
  float student_expectation;  // E_s[r], for jsd
};

// The student's and the teacher's row, read in the same vectors.
template <Divergence kKind>
struct RowPair {
  const DivergenceRows& call;
  MatrixRow student, teacher, student_bias, teacher_bias;
  int shift;  // the first vector begins so many numbers before the row

  __device__ __forceinline__ RowPair(const DivergenceRows& call_, int64_t row)
      : call(call_),
        student(call.student.data, call.student.dtype, row, call.student.stride, call.student.column_stride),
        teacher(call.teacher.data, call.teacher.dtype, row, call.teacher.stride, call.teacher.column_stride),
        student_bias(call.student.bias, Dtype::float32, 0, 0, 1),
        teacher_bias(call.teacher.bias, Dtype::float32, 0, 0, 1) {
    shift = student.preferred_shift();
    for (MatrixRow* each : {&student, &teacher, &student_bias, &teacher_bias}) each->align(shift);
  }

  __device__ __forceinline__ int64_t vector_count(int64_t columns) const {
    return (columns + shift + kVectorSize - 1) / kVectorSize;
  }
  __device__ __forceinline__ int64_t first_column(int64_t vector) const { return vector * kVectorSize - shift; }

  // Loads a vector: z_p and z_q, -inf beyond the vocabulary, and the derivative of z_s with respect to the argument of
  // its tanh (1 without softcap).
  __device__ __forceinline__ void load(int64_t first, float (&p)[kVectorSize], float (&q)[kVectorSize],
                                       float (&slope)[kVectorSize]) const {
    constexpr bool kStudentIsP = DivergenceTraits<kKind>::kStudentIsP;
    load_row(student, student_bias, first, kStudentIsP ? p : q);
    load_row(teacher, teacher_bias, first, kStudentIsP ? q : p);
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      const float z = kStudentIsP ? p[i] : q[i];
      slope[i] = !call.capped ? 1.0f : z == -kInfinity ? 0.0f : 1.0f - z * z;
    }
  }

 private:
  __device__ __forceinline__ void load_row(const MatrixRow& row, const MatrixRow& bias, int64_t first,
                                           float (&z)[kVectorSize]) const {
    row.load(first, call.vocab, 0.0f, z);
    if (bias.data != nullptr) {
      float bias_values[kVectorSize];
      bias.load(first, call.vocab, 0.0f, bias_values);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) z[i] += bias_values[i];
    }
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      const int64_t column = first + i;
      if (call.capped) z[i] = tanhf(z[i] * call.inner);
      if (call.negated) z[i] = -z[i];
      if (column < 0 || column >= call.vocab) z[i] = -kInfinity;
    }
  }
};

// The sums of a row, over all threads.
template <Divergence kKind>
__device__ __forceinline__ RowSums<kKind> first_pass(const RowPair<kKind>& rows, float scale,
                                                     BlockScratch<5, kThreads>& scratch) {
  RowSums<kKind> sums;
  float p[kVectorSize], q[kVectorSize], slope[kVectorSize];
  const int64_t vector_count = rows.vector_count(rows.call.vocab);
  for (int64_t vector = threadIdx.x; vector < vector_count; vector += kThreads) {
    rows.load(rows.first_column(vector), p, q, slope);
    float p_max = p[0], q_max = q[0];
#pragma unroll
    for (int i = 1; i < kVectorSize; ++i) {
      p_max = fmaxf(p_max, p[i]);
      q_max = fmaxf(q_max, q[i]);
    }
    sums.raise_maxima(p_max, q_max, scale);
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) sums.add(p[i], q[i], scale);
  }
  float maxima[5] = {sums.p_max, sums.q_max, 0, 0, 0};
  max_block(maxima, scratch);
  sums.rescale(maxima[0], maxima[1], scale);
  float parts[5] = {sums.p_sum, sums.q_sum, sums.change_sum, sums.excess_sum, sums.difference_sum};
  sum_block(parts, scratch);
  sums.p_sum = parts[0];
  sums.q_sum = parts[1];
  sums.change_sum = parts[2];
  sums.excess_sum = parts[3];
  sums.difference_sum = parts[4];
  return sums;
}

// The second pass of the jsd: the loss as the sum of b p_t phi(l) + (1-b) p_s phi(-r), whose terms are at least 0, and
// E_s[r].
__device__ __forceinline__ float2 jsd_pass(const RowPair<Divergence::jsd>& rows, const RowStatistics& statistics,
                                           BlockScratch<5, kThreads>& scratch) {
  const float scale = rows.call.scale, beta = rows.call.beta;
  const float student_normaliser = statistics.normaliser * exp_fast(-statistics.centre);
  float losses = 0, expectation = 0;
  float p[kVectorSize], q[kVectorSize], slope[kVectorSize];
  const int64_t vector_count = rows.vector_count(rows.call.vocab);
  for (int64_t vector = vector_count - 1 - threadIdx.x; vector >= 0; vector -= kThreads) {
    rows.load(rows.first_column(vector), p, q, slope);
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      const float teacher = exp_fast((p[i] - statistics.p_base) * scale) * statistics.normaliser;
      const float student = exp_fast((q[i] - statistics.q_base) * scale) * student_normaliser;
      const float delta = difference_of(p[i], q[i], statistics.q_base - statistics.p_base, scale) - statistics.centre;
      const float2 mixture = mixture_of(delta, beta);
      const float student_term = product_or_zero(student, mixture.y);  // p_s r
      losses += fabsf(delta) <= 1
                    ? beta * teacher * excess_near(mixture.x) + (1 - beta) * student * excess_near(-mixture.y)
                    : (1 - beta) * student_term - beta * product_or_zero(teacher, mixture.x);
      expectation += student_term;
    }
  }
  float parts[5] = {losses, expectation, 0, 0, 0};
  sum_block(parts, scratch);
  return {parts[0], parts[1]};
}

// Computes and writes the loss of a row, and returns its statistics.
template <Divergence kKind>
__device__ __forceinline__ RowStatistics measure(const RowPair<kKind>& rows, int64_t row,
                                                 BlockScratch<5, kThreads>& scratch) {
  using Traits = DivergenceTraits<kKind>;
  const DivergenceRows& call = rows.call;
  const RowSums<kKind> sums = first_pass(rows, call.scale, scratch);
  const bool has_p = sums.p_max > -kInfinity || sums.p_sum != 0;  // a row with NaN counts
  const bool has_q = sums.q_max > -kInfinity || sums.q_sum != 0;
  const float normaliser = 1.0f / (sums.p_sum == 0 ? 1.0f : sums.p_sum);
  RowStatistics statistics = {base_of(sums.p_max), base_of(sums.q_max), 0, normaliser, 0};
  const float mean_change = sums.change_sum * statistics.normaliser;  // E
  const bool centred = fabsf(mean_change) < 0.5f;
  const float log_ratio = centred ? log1p_near(mean_change) : logf(sums.q_sum * statistics.normaliser);  // L
  float value;
  statistics.centre = log_ratio;
  if constexpr (!Traits::kIsKl) {
    const float2 loss_and_expectation = jsd_pass(rows, statistics, scratch);
    value = loss_and_expectation.x;
    statistics.student_expectation = loss_and_expectation.y;
  } else {
    const float mean_difference = sums.difference_sum * statistics.normaliser;  // E_p[D]
    const float mean_excess = sums.excess_sum * statistics.normaliser;          // X
    value = centred ? mean_excess + log1p_minus(mean_change) : log_ratio - mean_difference;
    if (mean_excess == kInfinity) value = kInfinity;
    if (Traits::kStudentIsP) statistics.centre = mean_difference;
  }
  const bool no_teacher = Traits::kStudentIsP ? !has_q : !has_p;
  const bool no_student = Traits::kStudentIsP ? !has_p : !has_q;
  if (value < 0) value = 0;  // a rounding error
  if (no_student) value = kInfinity;
  if (no_teacher) value = 0;
  if (no_teacher || no_student || (Traits::kStudentIsP && value == kInfinity)) statistics.normaliser = 0;
  if (threadIdx.x == 0) {
    call.loss[row] = value * call.loss_scale;
    if (call.statistics != nullptr) {
      float* stored = call.statistics + row * kStatistics;
      stored[0] = statistics.p_base;
      stored[1] = statistics.q_base;
      stored[2] = statistics.centre;
      stored[3] = statistics.normaliser;
      stored[4] = statistics.student_expectation;
    }
  }
  return statistics;
}

// d loss / d z_s of one vocabulary entry.
template <Divergence kKind>
__device__ __forceinline__ float gradient_of(float p, float q, const RowStatistics& statistics,
                                             float student_normaliser, float scale, float beta) {
  const float d = difference_of(p, q, statistics.q_base - statistics.p_base, scale);
  const float delta = d - statistics.centre;
  if constexpr (kKind == Divergence::reverse) {
    return -product_or_zero(exp_fast((p - statistics.p_base) * scale) * statistics.normaliser, delta);
  } else {
    const float eq = exp_fast((q - statistics.q_base) * scale) * student_normaliser;
    if constexpr (kKind == Divergence::forward) {
      const float ep = exp_fast((p - statistics.p_base) * scale) * statistics.normaliser;
      return fabsf(delta) <= 1 ? ep * (delta + excess_near(delta)) : eq - ep;
    } else {
      static_assert(kKind == Divergence::jsd, "this divergence has no gradient here");
      return (1 - beta) * product_or_zero(eq, mixture_of(delta, beta).y - statistics.student_expectation);
    }
  }
}

template <Divergence kKind>
__device__ __forceinline__ void write_gradient(const RowPair<kKind>& rows, int64_t row, const RowStatistics& statistics,
                                               bool active) {
  const DivergenceRows& call = rows.call;
  MatrixRow out(call.gradient, call.gradient_dtype, row, call.gradient_stride, 1);
  out.align(rows.shift);
  float factor = call.gradient_scale;
  if (active && call.row_scale != nullptr) factor *= call.row_scale[row];
  // Without row_scale the gradient is the input of a GEMM and is kept finite. It is only that large where the reverse
  // KL is in the hundreds.
  const bool clamped = call.gradient_dtype == Dtype::float16 && call.row_scale == nullptr;
  const bool zero_row = !active || statistics.normaliser == 0;
  const float student_normaliser = statistics.normaliser * exp_fast(-statistics.centre);
  float p[kVectorSize], q[kVectorSize], slope[kVectorSize], value[kVectorSize] = {};
  for (int64_t vector = rows.vector_count(call.columns) - 1 - threadIdx.x; vector >= 0; vector -= kThreads) {
    const int64_t first = rows.first_column(vector);
    if (!zero_row) {
      rows.load(first, p, q, slope);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) {
        const bool inside = first + i < call.vocab;
        value[i] =
            gradient_of<kKind>(p[i], q[i], statistics, student_normaliser, call.scale, call.beta) * factor * slope[i];
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
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    divergence_kernel(const __grid_constant__ DivergenceRows call) {
  auto& shared = arch::shared_storage<Storage>();
  const int64_t row = blockIdx.x;
  const bool active = call.weights == nullptr || call.weights[row] != 0;
  const RowPair<kKind> rows(call, row);
  RowStatistics statistics = {};
  if (active && call.loss != nullptr) {
    statistics = measure(rows, row, shared.scratch);
  } else if (active) {
    const float* stored = call.statistics + row * kStatistics;
    statistics = {stored[0], stored[1], stored[2], stored[3], stored[4]};
  } else if (call.loss != nullptr && threadIdx.x == 0) {
    call.loss[row] = 0;
    if (call.statistics != nullptr) {
      for (int i = 0; i < kStatistics; ++i) call.statistics[row * kStatistics + i] = 0;
    }
  }
  if (call.gradient != nullptr) write_gradient(rows, row, statistics, active);
}

}  // namespace

void divergence_rows(Divergence kind, const DivergenceRows& call, cudaStream_t stream) {
  const auto launch_kernel = [&](auto* kernel) {
    launch("divergence_rows", kernel, static_cast<unsigned>(call.rows), kThreads, sizeof(Storage), stream, call);
  };
  switch (kind) {
    case Divergence::forward: return launch_kernel(divergence_kernel<Divergence::forward>);
    case Divergence::reverse: return launch_kernel(divergence_kernel<Divergence::reverse>);
    case Divergence::jsd: return launch_kernel(divergence_kernel<Divergence::jsd>);
  }
  throw std::invalid_argument("unknown divergence " + std::to_string(static_cast<int>(kind)));
}

}  // namespace softprompt
