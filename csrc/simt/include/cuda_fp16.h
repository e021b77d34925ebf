// CUDA's fp16 on the host: the functions that csrc/cuda uses.
#pragma once

#include "cuda_runtime.h"
#include "simt/formats.h"

struct __half {
  uint16_t bits;

  __half() = default;
  SPK_DEVICE __half(float value) : bits(softprompt::simt::to_float16(value)) {}
  SPK_DEVICE operator float() const { return softprompt::simt::from_float16(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};

SPK_DEVICE __half __float2half_rn(float value) { return value; }
SPK_DEVICE __half __float2half(float value) { return value; }
SPK_DEVICE float __half2float(__half value) { return value; }
SPK_DEVICE __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
SPK_DEVICE float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
