// Sums and maxima over the threads of a block, in the same order at every run.
#pragma once

#include <cuda_runtime.h>

namespace softprompt {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <int kCount, int kThreads>
struct BlockScratch {
  float parts[kThreads / kWarp][kCount];
};

// Combines `values` of all threads, each of the kCount with its own operation; every thread gets the results.
template <int kCount, int kThreads, class Combine>
__device__ __forceinline__ void combine_block(float (&values)[kCount], BlockScratch<kCount, kThreads>& scratch,
                                              const Combine& combine) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int by = kWarp / 2; by > 0; by /= 2) {
      values[i] = combine(values[i], __shfl_xor_sync(kAllLanes, values[i], by));
    }
  }
  __syncthreads();  // what the scratch was last used for has been read
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch.parts[warp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float all = scratch.parts[0][i];
#pragma unroll
    for (int w = 1; w < kThreads / kWarp; ++w) all = combine(all, scratch.parts[w][i]);
    values[i] = all;
  }
}

template <int kCount, int kThreads>
__device__ __forceinline__ void sum_block(float (&values)[kCount], BlockScratch<kCount, kThreads>& scratch) {
  combine_block(values, scratch, [](float a, float b) { return a + b; });
}

template <int kCount, int kThreads>
__device__ __forceinline__ void largest_of_block(float (&values)[kCount], BlockScratch<kCount, kThreads>& scratch) {
  combine_block(values, scratch, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace softprompt
