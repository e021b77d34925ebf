// The loss kernels of one thread that see rows: divergences of rows in place, divergences of given logits, and the
// exponentials of a head's expectation. A row stays in the cache from its first pass to its last.
#include "cpu/losses/divergence_fallback.h"
#include "cpu/losses/kernels.h"
#include "cpu/losses/kl.h"

namespace softprompt::SPK_ISA {
namespace {

template <Divergence kind, Want want>
RowResult divergence_of(const Row& row) {
  const RowMaxima maxima = find_maxima<kind>(row);
  if (!maxima.formulas_hold) return fallback_divergence<kind>(row, want);
  if constexpr (kind == Divergence::jsd) {
    return jsd_of_row<want>(row, maxima);
  } else {
    return kl_of_row<kind, want>(row, maxima);
  }
}

template <Divergence kind>
RowResult divergence_of(const Row& row, Want want) {
  switch (want) {
    case Want::loss: return divergence_of<kind, Want::loss>(row);
    case Want::gradient: return divergence_of<kind, Want::gradient>(row);
    case Want::capped_gradient: return divergence_of<kind, Want::capped_gradient>(row);
  }
  __builtin_trap();
}

RowResult divergence_of(Divergence kind, const Row& row, Want want) {
  switch (kind) {
    case Divergence::forward: return divergence_of<Divergence::forward>(row, want);
    case Divergence::reverse: return divergence_of<Divergence::reverse>(row, want);
    case Divergence::jsd: return divergence_of<Divergence::jsd>(row, want);
  }
  __builtin_trap();  // the bindings refuse any other number
}

template <bool apply_expm1, class T>
void write_gradient(const Row& row, float centre, float scale, T* gradient) {
  for_each_vector(row.weight, row.value, 0, row.vocab,
        [&](int64_t i, Vec weight, Vec value, int count) __attribute__((always_inline)) {
          store_n(gradient + i, weight * (apply_expm1 ? expm1(value - centre) : value - centre) * scale, count);
        });
}

template <class T>
void write_gradient(const Row& row, const RowResult& result, float scale, T* gradient) {
  if (result.applies_expm1) {
    write_gradient<true>(row, result.centre, result.scale * scale, gradient);
  } else {
    write_gradient<false>(row, result.centre, result.scale * scale, gradient);
  }
}

PrefetchRow ahead_of(const void* logits, Dtype dtype, int64_t offset) {
  const int64_t element = kBytes[static_cast<int>(dtype)];
  return {static_cast<const char*>(logits) + offset * element, element};
}

// --- given logits ----------------------------------------------------------------------------------------------------

template <class T>
void read_logits(const T* row, int64_t vocab, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) store(out + i, load(row + i));
  if (i < vocab) store_part(out + i, load_part(row + i, static_cast<int>(vocab - i)), static_cast<int>(vocab - i));
}

// A row in fp32: where it lies, or converted into `workspace`.
const float* logits_of(const void* logits, Dtype dtype, int64_t offset, int64_t vocab, float* workspace) {
  switch (dtype) {
    case Dtype::float32: return static_cast<const float*>(logits) + offset;
    case Dtype::bfloat16: read_logits(static_cast<const BFloat16*>(logits) + offset, vocab, workspace); break;
    case Dtype::float16: read_logits(static_cast<const Float16*>(logits) + offset, vocab, workspace); break;
  }
  return workspace;
}

// The gradient of a row in its dtype, and 0 in the columns after it. A row of weight 0 (`row` is nullptr) gets all 0.
template <class T>
void write_row(const KlLogits& call, int64_t index, const Row* row, const RowResult& result, T zero) {
  T* gradient = static_cast<T*>(call.gradient) + index * call.gradient_stride;
  if (row != nullptr) {
    write_gradient(*row, result, call.temperature * call.row_scale[index], gradient);
  }
  for (int64_t i = row == nullptr ? 0 : call.vocab; i < call.columns; ++i) gradient[i] = zero;
}

void write_row(const KlLogits& call, int64_t index, const Row* row, const RowResult& result) {
  switch (call.student_dtype) {
    case Dtype::float32: return write_row(call, index, row, result, 0.0f);
    case Dtype::bfloat16: return write_row(call, index, row, result, BFloat16{0});
    case Dtype::float16: return write_row(call, index, row, result, Float16{0});
  }
}

}  // namespace

void kl_rows(const KlRows& call, int thread) {
  const float inverse_softcap = call.softcap > 0 ? 1 / call.softcap : 0;
  const Want want = !call.gradient ? Want::loss : call.softcap > 0 ? Want::capped_gradient : Want::gradient;
  const auto [begin, end] = thread_range(call.rows, thread, call.threads);
  for (int64_t index = begin; index < end; ++index) {
    float* student = call.student + index * call.student_stride;
    float* teacher = call.teacher + index * call.teacher_stride;
    finish_logits(student, call.student_bias, 1, call.vocab, call.softcap);
    finish_logits(teacher, call.teacher_bias, 1, call.vocab, call.softcap);
    const int64_t next = index + 1 < end ? index + 1 : index;
    const Row row = {student,
                     teacher,
                     teacher,
                     student,
                     call.vocab,
                     1,
                     inverse_softcap,
                     call.beta,
                     {ahead_of(call.student, Dtype::float32, next * call.student_stride),
                      ahead_of(call.teacher, Dtype::float32, next * call.teacher_stride)}};
    const RowResult result = divergence_of(call.divergence, row, want);
    call.loss[index] = result.loss;
    if (call.gradient) write_gradient(row, result, 1, student);
  }
}

void kl_logits(const KlLogits& call, int thread) {
  float* value = call.workspace + 2 * call.vocab * thread;
  float* weight = value + call.vocab;
  const Want want = call.gradient == nullptr ? Want::loss : Want::gradient;
  const auto [begin, end] = thread_range(call.rows, thread, call.threads);
  for (int64_t index = begin; index < end; ++index) {
    const bool skipped = call.weights != nullptr && call.weights[index] == 0;
    const int64_t next = index + 1 < end ? index + 1 : index;
    Row row = {nullptr,
               nullptr,
               weight,
               value,
               call.vocab,
               1 / call.temperature,
               0,
               call.beta,
               {ahead_of(call.student, call.student_dtype, next * call.student_stride),
                ahead_of(call.teacher, call.teacher_dtype, next * call.teacher_stride)}};
    RowResult result = {};
    if (!skipped) {
      row.student = logits_of(call.student, call.student_dtype, index * call.student_stride, call.vocab, value);
      row.teacher = logits_of(call.teacher, call.teacher_dtype, index * call.teacher_stride, call.vocab, weight);
      result = divergence_of(call.divergence, row, want);
    }
    if (call.gradient == nullptr) {
      call.loss[index] = result.loss * call.temperature * call.temperature;
    } else {
      write_row(call, index, skipped ? nullptr : &row, result);
    }
  }
}

// --- expectation -----------------------------------------------------------------------------------------------------

namespace {

// Adds the bias, stores the label's logit, and returns the largest logit.
float finish_tile(const ExpectationRows& call, int64_t index, float* logits) {
  finish_logits(logits, call.bias, call.bias_scale, call.columns, 0);
  if (call.labels != nullptr) {
    const int64_t column = call.labels[index] - call.first_column;
    if (call.labels[index] >= 0 && column >= 0 && column < call.columns) call.label_logit[index] = logits[column];
  }
  return row_max(logits, call.columns);
}

// Makes the sums relative to a larger row max; `factor` is exp(old - new).
void rescale(const ExpectationRows& call, int64_t index, double factor) {
  call.row_sum[index] *= factor;
  if (call.bias_sum != nullptr) call.bias_sum[index] *= factor;
  if (call.mean == nullptr) return;
  float* mean = call.mean + index * call.mean_stride;
  const float scale = static_cast<float>(factor);
  for (int64_t i = 0; i < call.size; ++i) mean[i] *= scale;
}

}  // namespace

void expectation_rows(const ExpectationRows& call, int thread) {
  const auto [begin, end] = thread_range(call.rows, thread, call.threads);
  for (int64_t index = begin; index < end; ++index) {
    float* logits = call.logits + index * call.stride;
    const float before = call.row_max[index], tile_max = finish_tile(call, index, logits);
    if (tile_max > before) {
      if (before > -kInfinity) rescale(call, index, __builtin_exp(static_cast<double>(before) - tile_max));
      call.row_max[index] = tile_max;
    }
    const float row_max = call.row_max[index] > -kInfinity ? call.row_max[index] : 0;
    sum_blocks(call.columns, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
      Vec row_sums = {};
      for_each_vector(logits, first, last, [&](int64_t i, Vec z, int count) __attribute__((always_inline)) {
        const Vec e = exp2((z - row_max) * kLog2E);
        row_sums += e;
        store_n(logits + i, e, count);
      });
      call.row_sum[index] += sum_lanes(row_sums);
    });
    if (call.bias_sum == nullptr) continue;
    sum_blocks(call.columns, [&](int64_t first, int64_t last) __attribute__((always_inline)) {
      Vec bias_sums = {};
      const auto add = [&](int64_t, Vec e, Vec bias, int) __attribute__((always_inline)) {
        bias_sums += select(bias == -kInfinity, Vec{}, e * bias);  // an absent entry adds nothing
      };
      for_each_vector(logits, call.bias, first, last, add);
      call.bias_sum[index] += sum_lanes(bias_sums);
    });
  }
}

}  // namespace softprompt::SPK_ISA
