// CUDA's bf16 on the host: the functions that csrc/cuda uses.
#pragma once

#include "cuda_runtime.h"
#include "simt/formats.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  SPK_DEVICE __nv_bfloat16(float value) : bits(softprompt::simt::to_bfloat16(value)) {}
  SPK_DEVICE operator float() const { return softprompt::simt::from_bfloat16(bits); }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

SPK_DEVICE __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
SPK_DEVICE __nv_bfloat16 __float2bfloat16(float value) { return value; }
SPK_DEVICE float __bfloat162float(__nv_bfloat16 value) { return value; }
SPK_DEVICE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
SPK_DEVICE float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
