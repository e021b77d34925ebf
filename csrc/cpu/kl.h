// Calls of the KL kernels: what the bindings check and fill in, and what each thread reads.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// Divergence of rows of fp32 logits, in place.
struct KlRows {
  float* student;  // [rows, vocab]; becomes the gradient of loss by the logits
  float* teacher;  // [rows, vocab]; overwritten
  float* loss;     // [rows]
  int64_t rows, vocab;
  int64_t student_stride, teacher_stride;
  Divergence divergence;
  float beta;
  float softcap;  // > 0: the logits are softcap * tanh(what is given), and the gradient is by what is given; 0: none
  int threads;
};

// Divergence of rows of given logits in any dtype, which are only read.
struct KlLogits {
  const void* student;    // [rows, vocab]
  const void* teacher;    // [rows, vocab]
  const float* row_scale;  // [rows], backward; nullptr: forward
  void* gradient;          // [rows, vocab] in the student's dtype, backward
  float* loss;             // [rows], forward
  int64_t rows, vocab;
  int64_t student_stride, teacher_stride, gradient_stride;
  Dtype student_dtype, teacher_dtype;
  Divergence divergence;
  float beta, temperature;
  float* scratch;  // [threads, 2, vocab rounded up]
  int threads;
};

// What p(v) ~ exp(z_v) needs: exponentials in place, and their sums.
struct ExpectationRows {
  float* logits;  // [rows, vocab]; becomes exp(z - max z)
  int64_t rows, vocab, stride;
  const int64_t* labels;   // [rows], negative: none; nullptr: no labels
  float* label_logit;      // [rows], 0 where there is no label
  double* log_partition;   // [rows]
  float* total;            // [rows] sum of the exponentials
  int threads;
};

}  // namespace softprompt
