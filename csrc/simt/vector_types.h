// CUDA's vector types, with the layout and alignment of the device.
#pragma once

#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SPK_VECTOR2(name, type, bytes) \
  struct alignas(bytes) name {         \
    type x, y;                         \
  };                                   \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SPK_VECTOR4(name, type, bytes) \
  struct alignas(bytes) name {         \
    type x, y, z, w;                   \
  };                                   \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

SPK_VECTOR2(float2, float, 8)
SPK_VECTOR2(int2, int, 8)
SPK_VECTOR2(uint2, unsigned, 8)
SPK_VECTOR4(float4, float, 16)
SPK_VECTOR4(int4, int, 16)
SPK_VECTOR4(uint4, unsigned, 16)

#undef SPK_VECTOR2
#undef SPK_VECTOR4
