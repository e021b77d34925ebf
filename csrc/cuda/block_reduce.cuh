// Sums and maxima over the threads of a block. The order of operations is fixed, so every run gives the same bits.
#pragma once

#include "cuda/arch.cuh"

namespace softprompt {

template <int kCount, int kThreads>
struct BlockScratch {
  float parts[kThreads / kWarpSize][kCount];
};

// Reduces the kCount `values` of all threads with `combine`, each value separately. Every thread gets the results.
template <int kCount, int kThreads, class Combine>
__device__ __forceinline__ void combine_block(float (&values)[kCount], BlockScratch<kCount, kThreads>& scratch,
                                              const Combine& combine) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      values[i] = combine(values[i], __shfl_xor_sync(kAllLanes, values[i], offset));
    }
  }
  __syncthreads();  // all threads have read the scratch of the previous reduction
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch.parts[warp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float all = scratch.parts[0][i];
#pragma unroll
    for (int w = 1; w < kThreads / kWarpSize; ++w) all = combine(all, scratch.parts[w][i]);
    values[i] = all;
  }
}

template <int kCount, int kThreads>
__device__ __forceinline__ void sum_block(float (&values)[kCount], BlockScratch<kCount, kThreads>& scratch) {
  combine_block(values, scratch, [](float a, float b) { return a + b; });
}

template <int kCount, int kThreads>
__device__ __forceinline__ void max_block(float (&values)[kCount], BlockScratch<kCount, kThreads>& scratch) {
  combine_block(values, scratch, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace softprompt
