// Calls of the KL kernels: what the bindings check and fill in, and what each thread reads.
//
// Every row is the work of one thread, so no result depends on how many there are.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// Divergence of rows of fp32 logits, in place. The logits are the products that are given plus `bias`, and, where there
// is a softcap, softcap * tanh of that.
struct KlRows {
  float* student;  // [rows, vocab]; with `gradient`, becomes the gradient of the loss by the logits, times the tanh' of
                   // a softcap (not times the softcap itself)
  float* teacher;  // [rows, vocab]; overwritten
  const float* student_bias;  // [vocab]; nullptr: none
  const float* teacher_bias;
  float* loss;  // [rows]
  int64_t rows, vocab;
  int64_t student_stride, teacher_stride;
  Divergence divergence;
  double beta;
  float softcap;  // 0: none
  bool gradient;
  int threads;
};

// Divergence of rows of given logits in any dtype, which are only read; times the square of the temperature.
struct KlLogits {
  const void* student;  // [rows, vocab]
  const void* teacher;  // [rows, vocab]
  const float* weights;    // [rows], rows of weight 0 are skipped; nullptr: none are
  const float* row_scale;  // [rows], backward
  void* gradient;          // [rows, columns] in the student's dtype, backward; nullptr: forward
  float* loss;             // [rows], forward
  int64_t rows, vocab, columns;  // columns of the gradient from `vocab` on are 0
  int64_t student_stride, teacher_stride, gradient_stride;
  Dtype student_dtype, teacher_dtype;
  Divergence divergence;
  double beta;
  float temperature;
  int threads;
  float* scratch;  // [threads, 2, vocab]
};

// A tile of the columns of z = h W' + bias_scale * bias, in a sweep over all of them that keeps max z, the sum of
// exp(z - max z) and what is weighted by it.
struct ExpectationRows {
  float* logits;      // [rows, columns]; becomes exp(z - max z), with the largest z of this tile and all before
  const float* bias;  // [columns]; nullptr: none
  const int64_t* labels;  // [rows], columns of the whole vocabulary; negative: none; nullptr: no labels
  float* label_logit;     // [rows], set by the tile that has the label's column
  float* largest;         // [rows] max z so far, -inf before the first tile
  double* total;          // [rows] sum of the exponentials so far
  double* bias_total;     // [rows] their sum weighted by the bias; nullptr: not wanted
  float* sum;             // [rows, size] their sum weighted by something of the caller's, which is only rescaled here
                          // when max z moves; nullptr: none
  int64_t rows, columns, size;
  int64_t stride, sum_stride;
  int64_t first_column;
  float bias_scale;
  int threads;
};

// What a sweep over tiles of the vocabulary has seen of a row, all 0 before the first. See kl_tile.cpp.
struct KlSoFar {
  double reference, centre;                         // m, c
  double total, other, change, excess, difference;  // S, R, C, X, Y
  double left_out;                                  // 1: the sums cannot serve this row
};

// A tile of the columns of the products of both sides, in a sweep over all of them for the forward or reverse KL. The
// logits are the products plus `bias`, and, where there is a softcap, softcap * tanh of that.
struct KlTile {
  float* student;  // [rows, columns]; with `sum`, becomes what the rows of W are weighted by in U
  float* teacher;  // [rows, columns]; becomes the same in T
  const float* student_bias;  // [columns]; nullptr: none
  const float* teacher_bias;
  KlSoFar* so_far;  // [rows]
  float* sum;       // [rows, size] U, which is only rescaled here; nullptr: no gradient
  float* total;     // [rows, size] T
  int64_t rows, columns, size;
  int64_t student_stride, teacher_stride, sum_stride, total_stride;
  Divergence divergence;  // not jsd
  float softcap;          // 0: none
  int threads;
  float* scratch;  // [threads, 2, columns]
};

// On all threads. They throw std::bad_alloc where there is no memory for scratch.
void run(const KlRows& call);
void run(const KlLogits& call);
void run(const ExpectationRows& call);
void run(const KlTile& call);

}  // namespace softprompt
