// CUDA's runtime and device functions on the host: those that csrc/cuda uses. See csrc/simt/README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "simt/runtime/device.h"
#include "simt/runtime/grid.h"
#include "simt/runtime/warp.h"
#include "simt/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __launch_bounds__(...)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

#define SPK_DEVICE inline __attribute__((always_inline))

// threadIdx and the like: each coordinate is looked up when it is read.
template <class Triple, Triple (*kLookUp)()>
struct SpkIndex {
  template <unsigned Triple::*kMember>
  struct Coordinate {
    SPK_DEVICE operator unsigned() const { return kLookUp().*kMember; }
  };
  Coordinate<&Triple::x> x;
  Coordinate<&Triple::y> y;
  Coordinate<&Triple::z> z;
};
inline constexpr SpkIndex<uint3, softprompt::simt::thread_index> threadIdx = {};
inline constexpr SpkIndex<uint3, softprompt::simt::block_index> blockIdx = {};
inline constexpr SpkIndex<dim3, softprompt::simt::block_size> blockDim = {};
inline constexpr SpkIndex<dim3, softprompt::simt::grid_size> gridDim = {};

// --- barriers, shuffles, votes ---------------------------------------------------------------------------------------

SPK_DEVICE void __syncthreads() { softprompt::simt::sync_threads(); }
SPK_DEVICE void __syncwarp(unsigned mask = 0xffffffffu) { softprompt::simt::sync_warp(mask); }

template <class T>
SPK_DEVICE T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return softprompt::simt::shuffle_value(softprompt::simt::Shuffle::index, mask, value, lane, width);
}
template <class T>
SPK_DEVICE T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return softprompt::simt::shuffle_value(softprompt::simt::Shuffle::up, mask, value, static_cast<int>(by), width);
}
template <class T>
SPK_DEVICE T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return softprompt::simt::shuffle_value(softprompt::simt::Shuffle::down, mask, value, static_cast<int>(by), width);
}
template <class T>
SPK_DEVICE T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  return softprompt::simt::shuffle_value(softprompt::simt::Shuffle::exclusive_or, mask, value, by, width);
}

SPK_DEVICE unsigned __ballot_sync(unsigned mask, int predicate) {
  return softprompt::simt::ballot(mask, predicate != 0);
}
SPK_DEVICE int __any_sync(unsigned mask, int predicate) { return softprompt::simt::ballot(mask, predicate != 0) != 0; }
SPK_DEVICE int __all_sync(unsigned mask, int predicate) { return softprompt::simt::ballot(mask, predicate == 0) == 0; }

SPK_DEVICE float atomicAdd(float* address, float value) { return softprompt::simt::atomic_add(address, value); }
SPK_DEVICE int atomicAdd(int* address, int value) { return softprompt::simt::atomic_add(address, value); }

// --- loads and stores with cache hints, which have no effect here ----------------------------------------------------

template <class T>
SPK_DEVICE T __ldg(const T* address) {
  return *address;
}
template <class T>
SPK_DEVICE T __ldcs(const T* address) {
  return *address;
}
template <class T>
SPK_DEVICE void __stcs(T* address, T value) {
  *address = value;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

using std::max;
using std::min;

// Macros, because the C library has functions with these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
SPK_DEVICE float __fdividef(float a, float b) { return a / b; }
SPK_DEVICE float rsqrtf(float x) { return 1.0f / sqrtf(x); }

SPK_DEVICE unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
SPK_DEVICE float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// --- the runtime -----------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
#define CUDART_VERSION 12080
enum cudaError_t { cudaSuccess = 0, cudaErrorInsufficientDriver = 35 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
template <class Function>
inline cudaError_t cudaFuncSetAttribute(Function*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;

    static void invoke(void* call) {
      const auto* self = static_cast<const Call*>(call);
      std::apply(self->kernel, self->parameters);
    }
  };
  Call call = {kernel, {std::forward<Arguments>(arguments)...}};
  softprompt::simt::run({config->gridDim, config->blockDim, reinterpret_cast<const void*>(kernel), &call, sizeof call,
                         &Call::invoke, 0},
                        config->dynamicSmemBytes);
  return cudaSuccess;
}
