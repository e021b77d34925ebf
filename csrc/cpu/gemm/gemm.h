// GEMM of fp32 accuracy, for processors on which it may be faster than the library that PyTorch calls. One
// implementation uses the matrix unit (gemm_amx.cpp). The other uses AVX-512 (gemm_avx512.cpp), which MKL uses on Intel
// processors only; of the other processors, Zen 5 was measured.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// out [rows, columns] = or += A [rows, depth] B [depth, columns]. Elements of a row are contiguous in memory.
struct Gemm {
  const float* a;
  const void* b;  // stored as [columns, depth] if b_transposed
  float* out;
  int64_t rows, depth, columns;
  int64_t a_stride, b_stride, out_stride;  // of rows, in elements
  Dtype b_dtype;
  bool b_transposed;
  bool accumulate;
  int threads;
};

// A part of a GEMM. Its A is packed once for all threads, before any of them multiplies.
struct GemmPart {
  Gemm gemm;        // some of the rows and some of the depth of the whole GEMM
  char* packed_a;   // gemm_packed_a_bytes
  char* workspace;  // gemm_workspace bytes for each thread
  int64_t workspace_bytes;
};

// Whether the chosen instruction set has a GEMM. If not, `run` throws std::invalid_argument.
bool has_gemm();

// Whether that GEMM is faster than MKL's on this processor.
bool has_fast_gemm();

// Runs on all threads. One thread computes each element, in an order of summation that depends on the sizes alone.
// Throws std::bad_alloc if there is no memory for the packed operands: 4 MiB, plus 1 MiB for each thread.
void run(const Gemm& call);

}  // namespace softprompt
