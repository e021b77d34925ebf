// The calls of the loss kernels. The bindings check and fill them in, and each thread reads them.
//
// One thread works on a whole row, so no result depends on the number of threads.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// Divergence of rows of fp32 logits, in place. `student` and `teacher` hold the results of the head's GEMM on entry. A
// logit is that plus `bias` and, with a softcap, softcap * tanh of the sum.
struct KlRows {
  float* student;  // [rows, vocab]; with `gradient`, becomes the gradient of the loss by the logits, times the tanh' of
                   // a softcap, but without the factor softcap
  float* teacher;  // [rows, vocab]; overwritten
  const float* student_bias;  // [vocab]; nullptr: none
  const float* teacher_bias;  // [vocab]; nullptr: none
  float* loss;                // [rows]
  int64_t rows, vocab;
  int64_t student_stride, teacher_stride;
  Divergence divergence;
  double beta;
  float softcap;  // 0: none
  bool gradient;
  int threads;
};

// Divergence of rows of given logits in any dtype, times the square of the temperature. The logits are only read.
struct KlLogits {
  const void* student;     // [rows, vocab]
  const void* teacher;     // [rows, vocab]
  const float* weights;    // [rows]; rows of weight 0 are skipped; nullptr: no row is skipped
  const float* row_scale;  // [rows]; backward: multiplies the gradient of each row
  void* gradient;          // [rows, columns] in the student's dtype; nullptr: this is the forward
  float* loss;             // [rows]; forward
  int64_t rows, vocab, columns;  // the gradient is 0 in the columns from `vocab` on
  int64_t student_stride, teacher_stride, gradient_stride;
  Dtype student_dtype, teacher_dtype;
  Divergence divergence;
  double beta;
  float temperature;
  int threads;
  float* workspace;  // [threads, 2, vocab]
};

// One tile of the vocabulary for the online softmax of rows of z = h W' + bias_scale * bias. The calls for all tiles
// together keep max z, the sum of exp(z - max z), and sums that exp(z - max z) weights.
struct ExpectationRows {
  float* logits;          // [rows, columns]; becomes exp(z - max z), with the largest z of this tile and all before
  const float* bias;      // [columns]; nullptr: none
  const int64_t* labels;  // [rows], columns of the whole vocabulary; negative: none; nullptr: no labels
  float* label_logit;     // [rows]; written by the tile that has the label's column
  float* row_max;         // [rows] max z of the tiles so far, -inf before the first
  double* row_sum;        // [rows] sum of the exponentials
  double* bias_sum;       // [rows] sum of the exponentials times the bias; nullptr: not wanted
  float* mean;            // [rows, size] sum of the exponentials times the rows of W, which the caller adds. The kernel
                          // only rescales it when max z grows; nullptr: none
  int64_t rows, columns, size;
  int64_t stride, mean_stride;
  int64_t first_column;
  float bias_scale;
  int threads;
};

// What is known of a row after some tiles of the vocabulary; all 0 before the first. kl_tile.cpp defines the letters.
// Python reads the fields as columns of a float64 tensor, in this order: see kernels/host/streamed_vocabulary.py.
struct KlTileState {
  double p_max;           // m
  double centre;          // c
  double p_sum;           // S
  double q_sum;           // R
  double expm1_sum;       // C
  double excess_sum;      // X
  double difference_sum;  // Y
  double needs_fallback;  // 1: the tiles cannot give the divergence of this row
};

// One tile of the vocabulary for the forward or reverse KL. `student` and `teacher` hold the results of the heads'
// GEMMs on entry. A logit is that plus `bias` and, with a softcap, softcap * tanh of the sum.
struct KlTile {
  float* student;  // [rows, columns]; with a gradient, becomes the weights of W's rows in U
  float* teacher;  // [rows, columns]; with a gradient, becomes the weights of W's rows in T
  const float* student_bias;    // [columns]; nullptr: none
  const float* teacher_bias;    // [columns]; nullptr: none
  KlTileState* state;           // [rows]
  float* gradient_accumulator;  // [rows, size] U, which is only rescaled here; nullptr: no gradient
  float* mean_accumulator;      // [rows, size] T, which is only rescaled here; nullptr: no gradient
  int64_t rows, columns, size;
  int64_t student_stride, teacher_stride, gradient_stride, mean_stride;
  Divergence divergence;  // forward or reverse
  float softcap;          // 0: none
  int threads;
  float* workspace;  // [threads, 2, columns]
};

// Each runs a call on all threads. It throws std::bad_alloc where there is no memory for the workspace. For a KlTile of
// another divergence than the forward and the reverse KL it throws std::invalid_argument.
void run(const KlRows& call);
void run(const KlLogits& call);
void run(const ExpectationRows& call);
void run(const KlTile& call);

}  // namespace softprompt
