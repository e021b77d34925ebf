// Reads and writes rows of tensors of any dtype, as the packed fp32 rows that the kernels compute with.
#pragma once

#include "cpu/platform/arena.h"
#include "cpu/platform/integers.h"
#include "cpu/platform/simd.h"
#include "tensor.h"

namespace softprompt::SPK_ISA {

template <class T>
SPK_INLINE void read_row_of(const T* source, int64_t size, float scale, float* row) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(row + i, load(source + i) * scale);
  if (i < size) store(row + i, load_part(source + i, static_cast<int>(size - i)) * scale);
}

// row[0, size) = scale * source, then 0 up to the next multiple of kLanes.
static void read_row(Dtype dtype, const char* source, int64_t size, float scale, float* row) {
  switch (dtype) {
    case Dtype::float32: return read_row_of(reinterpret_cast<const float*>(source), size, scale, row);
    case Dtype::bfloat16: return read_row_of(reinterpret_cast<const BFloat16*>(source), size, scale, row);
    case Dtype::float16: return read_row_of(reinterpret_cast<const Float16*>(source), size, scale, row);
  }
}

template <class T>
SPK_INLINE void write_row_of(T* target, int64_t size, float scale, const float* row) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(target + i, load(row + i) * scale);
  if (i < size) store_part(target + i, load(row + i) * scale, static_cast<int>(size - i));
}

// target = scale * row[0, size), rounded to the dtype.
[[maybe_unused]] static void write_row(Dtype dtype, char* target, int64_t size, float scale, const float* row) {
  switch (dtype) {
    case Dtype::float32: return write_row_of(reinterpret_cast<float*>(target), size, scale, row);
    case Dtype::bfloat16: return write_row_of(reinterpret_cast<BFloat16*>(target), size, scale, row);
    case Dtype::float16: return write_row_of(reinterpret_cast<Float16*>(target), size, scale, row);
  }
}

template <class T>
SPK_INLINE float dot_row_of(const T* source, int64_t size, const float* row) {
  Vec sum = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sum += load(source + i) * load(row + i);
  if (i < size) sum += load_part(source + i, static_cast<int>(size - i)) * load(row + i);
  return sum_lanes(sum);
}

// The dot product of source and row[0, size).
[[maybe_unused]] static float dot_row(Dtype dtype, const char* source, int64_t size, const float* row) {
  switch (dtype) {
    case Dtype::float32: return dot_row_of(reinterpret_cast<const float*>(source), size, row);
    case Dtype::bfloat16: return dot_row_of(reinterpret_cast<const BFloat16*>(source), size, row);
    default: return dot_row_of(reinterpret_cast<const Float16*>(source), size, row);
  }
}

}  // namespace softprompt::SPK_ISA
