// Calls of the losses' row work, as a launcher takes them. Pointers are on the device, strides in elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// One side's logits [rows, vocab], any strides.
struct LogitRows {
  const void* data;
  Dtype dtype;
  int64_t stride, column_stride;
  const float* bias;  // [vocab], nullptr: none
};

// Divergence of rows: see kl_rows.cu. Logits are scale * z, scale > 0, with z = given + bias, or tanh(inner * (given +
// bias)) where they are capped; negated: z is -(given + bias).
struct DivergenceRows {
  LogitRows student, teacher;
  const float* weights;    // [rows], nullptr: all 1; rows of weight 0 are skipped
  const float* row_scale;  // [rows], nullptr: all 1; multiplies the gradient
  float* statistics;       // [rows, kStatistics]; written with `loss`, read without it
  float* loss;             // [rows], nullptr: nothing is measured
  void* gradient;          // [rows, columns], 0 from `vocab` on; nullptr: none. It may be the student's logits
  Dtype gradient_dtype;
  int64_t gradient_stride;
  int64_t rows, vocab, columns;
  float scale, inner, beta, loss_scale, gradient_scale;
  bool capped, negated;
};

constexpr int kStatistics = 5;

void divergence_rows(Divergence kind, const DivergenceRows& call, cudaStream_t stream);

// A tile of the vocabulary of an expectation: see expectation_rows.cu.
struct ExponentialRows {
  const float* products;  // [rows, columns]
  const float* bias;      // [columns], nullptr: none; -inf removes a word
  const float* weights;   // [rows], nullptr: all 1; in rows of weight 0, e is 0 and the state stays
  const int64_t* labels;  // [rows], words of the whole vocabulary; nullptr: none
  float* largest;         // [rows]
  double* total;          // [rows]
  double* bias_total;     // [rows], nullptr: none
  float* label_logit;     // [rows], nullptr: none
  float* mean;            // [rows, size], nullptr: none
  void* high;             // [rows, columns], part_scale * e; nullptr: not wanted. It may be `products`
  void* low;              // [rows, columns], what rounding of the above lost; nullptr: not wanted
  Dtype part_dtype;
  int64_t rows, columns, size;
  int64_t products_stride, mean_stride, high_stride, low_stride;
  int64_t first;  // word of the first column
  float scale, part_scale;
};

void exponential_rows(const ExponentialRows& call, cudaStream_t stream);

}  // namespace softprompt
