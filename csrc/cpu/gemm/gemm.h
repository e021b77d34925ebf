// Dense products of fp32 accuracy, where there may be something faster for them than the library that PyTorch calls: the
// matrix unit (gemm_amx.cpp), and AVX-512 (gemm_avx512.cpp), of which MKL makes use on Intel's processors alone
// (of the others, Zen 5 was measured).
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// out [rows, columns] = or += left [rows, depth] right [depth, columns]. Elements of a row are neighbours in memory.
struct Product {
  const float* left;
  const void* right;  // with right_transposed, [columns, depth]
  float* out;
  int64_t rows, depth, columns;
  int64_t left_stride, right_stride, out_stride;
  Dtype right_dtype;
  bool right_transposed;
  bool accumulate;
  int threads;
};

// A part of a product. What is packed of its left side is packed for all threads, before any of them multiplies.
struct ProductPart {
  Product product;  // of some rows and some of the depth
  char* left;       // product_left_bytes
  char* workspace;  // product_workspace bytes for each thread
  int64_t workspace_bytes;
};

// Whether the instruction set has products. Without them, `run` throws std::invalid_argument.
bool has_products();

// Whether they are faster than MKL's on this processor.
bool has_fast_products();

// On all threads; each element is the work of one thread, whose order of summing depends on the sizes alone. Throws
// std::bad_alloc where there is no memory for the packed sides: 4 MiB, and 1 MiB a thread.
void run(const Product& call);

}  // namespace softprompt
