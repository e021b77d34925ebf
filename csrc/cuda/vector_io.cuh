// Rows of 16-bit and 32-bit numbers in memory, read and written as fp32: eight at a time where the address is a
// multiple of 16 bytes, else one at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "tensor.h"

namespace softprompt {

constexpr int kVectorSize = 8;  // numbers that a thread reads at once: 16 bytes of a 16-bit dtype

__device__ __forceinline__ int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

__device__ __forceinline__ float2 widen(uint32_t pair, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  const __half2 half = *reinterpret_cast<const __half2*>(&pair);
  return __half22float2(half);
}

__device__ __forceinline__ uint32_t narrow(float x, float y, Dtype dtype) {
  if (dtype == Dtype::bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float load_element(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[index];
  if (dtype == Dtype::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  return __half2float(static_cast<const __half*>(data)[index]);
}

__device__ __forceinline__ void store_element(void* data, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype == Dtype::bfloat16) {
    static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(data)[index] = __float2half_rn(value);
  }
}

// Eight consecutive numbers at an address that is a multiple of 16.
__device__ __forceinline__ void load_vector(const void* address, Dtype dtype, float (&out)[kVectorSize]) {
  const auto* vectors = static_cast<const uint4*>(address);
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = vectors[i];
      out[4 * i] = __uint_as_float(four.x);
      out[4 * i + 1] = __uint_as_float(four.y);
      out[4 * i + 2] = __uint_as_float(four.z);
      out[4 * i + 3] = __uint_as_float(four.w);
    }
    return;
  }
  const uint4 eight = *vectors;
  const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = widen(pairs[i], dtype);
    out[2 * i] = two.x;
    out[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ void store_vector(void* address, Dtype dtype, const float (&in)[kVectorSize]) {
  auto* vectors = static_cast<uint4*>(address);
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      vectors[i] = make_uint4(__float_as_uint(in[4 * i]), __float_as_uint(in[4 * i + 1]),
                              __float_as_uint(in[4 * i + 2]), __float_as_uint(in[4 * i + 3]));
    }
    return;
  }
  *vectors = make_uint4(narrow(in[0], in[1], dtype), narrow(in[2], in[3], dtype), narrow(in[4], in[5], dtype),
                        narrow(in[6], in[7], dtype));
}

// One row of a matrix, read and written in vectors of eight numbers.
//
// The first vector begins `shift` numbers before the row. `shift` is chosen for one row so that its vectors lie at
// multiples of 16 bytes. Other rows use the same shift, and are vectorized if that aligns their vectors too.
struct MatrixRow {
  const char* data;
  Dtype dtype;
  int64_t column_stride;
  bool vectorized;

  __device__ __forceinline__ MatrixRow(const void* matrix, Dtype dtype_, int64_t row, int64_t stride,
                                       int64_t column_stride_)
      : data(static_cast<const char*>(matrix) + row * stride * bytes_of(dtype_)),
        dtype(dtype_),
        column_stride(column_stride_),
        vectorized(false) {}

  // The shift that aligns this row's vectors.
  __device__ __forceinline__ int preferred_shift() const {
    const auto beyond = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16);
    return column_stride == 1 ? beyond / bytes_of(dtype) : 0;
  }

  // Decides whether the row can be read in vectors with this shift.
  __device__ __forceinline__ void align(int shift) {
    vectorized = column_stride == 1 && (reinterpret_cast<uintptr_t>(data) - shift * bytes_of(dtype)) % 16 == 0;
  }

  // The vector that begins at column `first`. Columns outside [0, count) are `fill`.
  __device__ __forceinline__ void load(int64_t first, int64_t count, float fill, float (&out)[kVectorSize]) const {
    if (vectorized && first >= 0 && first + kVectorSize <= count) {
      load_vector(data + first * bytes_of(dtype), dtype, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      const int64_t column = first + i;
      out[i] = column >= 0 && column < count ? load_element(data, dtype, column * column_stride) : fill;
    }
  }

  // Writes the columns of a vector that are in [0, count).
  __device__ __forceinline__ void store(int64_t first, int64_t count, const float (&in)[kVectorSize]) const {
    char* to = const_cast<char*>(data);
    if (vectorized && first >= 0 && first + kVectorSize <= count) {
      store_vector(to + first * bytes_of(dtype), dtype, in);
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      const int64_t column = first + i;
      if (column >= 0 && column < count) store_element(to, dtype, column * column_stride, in[i]);
    }
  }
};

}  // namespace softprompt
