// Arguments of the row kernels of the losses. Pointers are to device memory, strides are in elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// Logits of the student or of the teacher, [rows, vocab] with any strides.
struct LogitRows {
  const void* data;
  Dtype dtype;
  int64_t stride, column_stride;
  const float* bias;  // [vocab], nullptr: none
};

// Divergence of each row: see kl_rows.cu. Logits are scale * z with scale > 0. z is given + bias, or
// tanh(inner * (given + bias)) if capped, where `given` is what memory holds. If negated, z is -(given + bias).
struct DivergenceRows {
  LogitRows student, teacher;
  const float* weights;    // [rows], nullptr: all 1. Rows of weight 0 are skipped
  const float* row_scale;  // [rows], nullptr: all 1. Multiplies the gradient
  float* statistics;       // [rows, kStatistics]. Written if `loss` is given, else read
  float* loss;             // [rows]. nullptr: no loss, only the gradient from the statistics
  void* gradient;          // [rows, columns], 0 from `vocab` on. nullptr: none. May be the student's logits
  Dtype gradient_dtype;
  int64_t gradient_stride;
  int64_t rows, vocab, columns;
  float scale, inner, beta, loss_scale, gradient_scale;
  bool capped, negated;
};

constexpr int kStatistics = 5;

void divergence_rows(Divergence kind, const DivergenceRows& call, cudaStream_t stream);

// One tile of the vocabulary of an expectation: see expectation_rows.cu.
struct ExponentialRows {
  const float* products;  // [rows, columns], hidden states times the head's weight
  const float* bias;      // [columns], nullptr: none. -inf removes a vocabulary entry
  const float* weights;   // [rows], nullptr: all 1. In rows of weight 0, e is 0 and the state does not change
  const int64_t* labels;  // [rows], indices into the whole vocabulary. nullptr: none
  float* row_max;         // [rows]
  double* row_sum;        // [rows]
  double* bias_sum;       // [rows], nullptr: none
  float* label_logit;     // [rows], nullptr: none
  float* mean;            // [rows, size], nullptr: none
  void* high;             // [rows, columns], part_scale * e. nullptr: not needed. May be `products`
  void* low;              // [rows, columns], the rounding error of `high`. nullptr: not needed
  Dtype part_dtype;
  int64_t rows, columns, size;
  int64_t products_stride, mean_stride, high_stride, low_stride;
  int64_t first;  // vocabulary entry of the first column
  float scale, part_scale;
};

void exponential_rows(const ExponentialRows& call, cudaStream_t stream);

}  // namespace softprompt
