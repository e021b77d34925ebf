// Numbers of 16 and 32 bits in memory, read and written as fp32, eight at a time where they lie at 16-byte boundaries.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "tensor.h"

namespace softprompt {

constexpr int kGroup = 8;  // numbers that a thread reads at a time: 16 bytes of 16-bit ones

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

__device__ __forceinline__ float load_number(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[at];
  if (dtype == Dtype::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
  return __half2float(static_cast<const __half*>(data)[at]);
}

__device__ __forceinline__ void store_number(void* data, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[at] = value;
  } else if (dtype == Dtype::bfloat16) {
    static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(data)[at] = __float2half_rn(value);
  }
}

// Eight neighbours at an address that is a multiple of 16.
__device__ __forceinline__ void load_group(const void* address, Dtype dtype, float (&out)[kGroup]) {
  const auto* words = static_cast<const uint4*>(address);
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = words[i];
      out[4 * i] = __uint_as_float(four.x);
      out[4 * i + 1] = __uint_as_float(four.y);
      out[4 * i + 2] = __uint_as_float(four.z);
      out[4 * i + 3] = __uint_as_float(four.w);
    }
    return;
  }
  const uint4 eight = *words;
  const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = widen(pairs[i], dtype);
    out[2 * i] = two.x;
    out[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ void store_group(void* address, Dtype dtype, const float (&in)[kGroup]) {
  auto* words = static_cast<uint4*>(address);
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[i] = make_uint4(__float_as_uint(in[4 * i]), __float_as_uint(in[4 * i + 1]), __float_as_uint(in[4 * i + 2]),
                            __float_as_uint(in[4 * i + 3]));
    }
    return;
  }
  *words = make_uint4(narrow(in[0], in[1], dtype), narrow(in[2], in[3], dtype), narrow(in[4], in[5], dtype),
                      narrow(in[6], in[7], dtype));
}

// A row of numbers, cut into groups of eight that begin `shift` before its first one, so that those of the row which
// says how to cut lie at 16-byte boundaries; another row has vectors where its groups happen to do so too.
struct NumberRow {
  const char* data;
  Dtype dtype;
  int64_t column_stride;
  bool vectors;

  __device__ __forceinline__ NumberRow(const void* matrix, Dtype dtype_, int64_t row, int64_t stride, int64_t columns_apart)
      : data(static_cast<const char*>(matrix) + row * stride * bytes_of(dtype_)),
        dtype(dtype_),
        column_stride(columns_apart),
        vectors(false) {}

  // How far before the row groups should begin for its own vectors.
  __device__ __forceinline__ int wanted_shift() const {
    const auto beyond = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16);
    return column_stride == 1 ? beyond / bytes_of(dtype) : 0;
  }

  __device__ __forceinline__ void cut(int shift) {
    vectors = column_stride == 1 && (reinterpret_cast<uintptr_t>(data) - shift * bytes_of(dtype)) % 16 == 0;
  }

  // Those of the group that begins at `first` which are within [0, count), `fill` in the others' places.
  __device__ __forceinline__ void load(int64_t first, int64_t count, float fill, float (&out)[kGroup]) const {
    if (vectors && first >= 0 && first + kGroup <= count) {
      load_group(data + first * bytes_of(dtype), dtype, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t at = first + i;
      out[i] = at >= 0 && at < count ? load_number(data, dtype, at * column_stride) : fill;
    }
  }

  __device__ __forceinline__ void store(int64_t first, int64_t count, const float (&in)[kGroup]) const {
    char* to = const_cast<char*>(data);
    if (vectors && first >= 0 && first + kGroup <= count) {
      store_group(to + first * bytes_of(dtype), dtype, in);
      return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t at = first + i;
      if (at >= 0 && at < count) store_number(to, dtype, at * column_stride, in[i]);
    }
  }
};

}  // namespace softprompt
