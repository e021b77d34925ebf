// One tile of the vocabulary in a loop over all of it: turns the output of the head's GEMM into exponentials and
// updates the state of an online softmax.
//
//     z = scale (product + bias),   m' = max(m, max z),   f = exp(m - m'),   e = exp(z - m')
//     row_sum = f row_sum + sum of e,   bias_sum = f bias_sum + sum of e bias,   mean = f mean
//
// A GEMM adds the sum of e W to the mean afterwards, with e in the dtype of W. If that dtype has 16 bits, e is written
// in two parts, e rounded and the rounding error. Their two GEMMs with W together are as accurate as one with a
// mantissa of 16 bits.
//
// One block a row. It reads the row's part of the tile twice, the second time from a cache. It rescales the row's mean
// only if m has changed. One exponential a vocabulary entry.
#include "cuda/arch.cuh"
#include "cuda/block_reduce.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"
#include "cuda/losses/kl.h"
#include "cuda/vector_io.cuh"

namespace softprompt {
namespace {

constexpr int kThreads = 256;

struct Storage {
  BlockScratch<2, kThreads> scratch;
};

// One row of the tile: products and bias.
struct TileRow {
  const ExponentialRows& call;
  MatrixRow products, bias;
  int shift;

  __device__ __forceinline__ TileRow(const ExponentialRows& call_, int64_t row)
      : call(call_),
        products(call.products, Dtype::float32, row, call.products_stride, 1),
        bias(call.bias, Dtype::float32, 0, 0, 1) {
    shift = products.preferred_shift();
    products.align(shift);
    bias.align(shift);
  }

  __device__ __forceinline__ int64_t vector_count() const {
    return (call.columns + shift + kVectorSize - 1) / kVectorSize;
  }

  // Loads a vector: z, which is -inf beyond the tile and for removed entries, and the bias, 0 for removed entries.
  __device__ __forceinline__ void load(int64_t first, float (&z)[kVectorSize], float (&b)[kVectorSize]) const {
    products.load(first, call.columns, 0.0f, z);
    if (bias.data != nullptr) bias.load(first, call.columns, 0.0f, b);
#pragma unroll
    for (int i = 0; i < kVectorSize; ++i) {
      const int64_t column = first + i;
      // Not by z = scale * -inf, which would be +inf for a negative scale.
      const bool removed = column < 0 || column >= call.columns || (bias.data != nullptr && b[i] == -kInfinity);
      if (bias.data == nullptr || removed) b[i] = 0;
      z[i] = removed ? -kInfinity : (z[i] + b[i]) * call.scale;
    }
  }
};

__global__ void __launch_bounds__(kThreads) exponentials_kernel(const __grid_constant__ ExponentialRows call) {
  auto& shared = arch::shared_storage<Storage>();
  const int64_t row = blockIdx.x;
  const bool active = call.weights == nullptr || call.weights[row] != 0;
  const TileRow tile(call, row);
  float z[kVectorSize], b[kVectorSize];

  // The label's product is read before any e overwrites it: the reductions have barriers.
  if (active && call.label_logit != nullptr && threadIdx.x == 0) {
    const int64_t label = call.labels[row] - call.first;
    if (label >= 0 && label < call.columns) {
      const float added = call.bias == nullptr ? 0.0f : call.bias[label];
      const float z = (call.products[row * call.products_stride + label] + added) * call.scale;
      call.label_logit[row] = added == -kInfinity ? -kInfinity : z;
    }
  }

  float maxima[2] = {-kInfinity, -kInfinity};
  if (active) {
    for (int64_t vector = threadIdx.x; vector < tile.vector_count(); vector += kThreads) {
      tile.load(vector * kVectorSize - tile.shift, z, b);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) maxima[0] = fmaxf(maxima[0], z[i]);
    }
  }
  max_block(maxima, shared.scratch);
  const float old_max = active ? call.row_max[row] : 0.0f;
  const float new_max = fmaxf(old_max, maxima[0]);
  const float base = new_max == -kInfinity ? 0.0f : new_max;  // no vocabulary entry yet

  MatrixRow high(call.high, call.part_dtype, row, call.high_stride, 1);
  MatrixRow low(call.low, call.part_dtype, row, call.low_stride, 1);
  high.align(tile.shift);
  low.align(tile.shift);
  float sums[2] = {};
  for (int64_t vector = tile.vector_count() - 1 - threadIdx.x; vector >= 0; vector -= kThreads) {
    const int64_t first = vector * kVectorSize - tile.shift;
    float e[kVectorSize] = {};
    if (active) {
      tile.load(first, z, b);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) {
        e[i] = exp_fast(z[i] - base);
        sums[0] += e[i];
        sums[1] += e[i] * b[i];
        e[i] *= call.part_scale;
      }
    }
    if (call.high != nullptr) {
      high.store(first, call.columns, e);
      if (call.low != nullptr) {
#pragma unroll
        for (int i = 0; i < kVectorSize; ++i) {
          const bool bfloat16 = call.part_dtype == Dtype::bfloat16;
          const float rounded = bfloat16 ? __bfloat162float(__float2bfloat16_rn(e[i]))
                                         : __half2float(__float2half_rn(e[i]));
          e[i] -= rounded;
        }
        low.store(first, call.columns, e);
      }
    }
  }
  if (!active) return;  // all threads of the block
  sum_block(sums, shared.scratch);
  const float factor = old_max == new_max ? 1.0f : old_max == -kInfinity ? 0.0f : exp_fast(old_max - base);
  if (threadIdx.x == 0) {
    call.row_max[row] = new_max;
    call.row_sum[row] = call.row_sum[row] * factor + sums[0];
    if (call.bias_sum != nullptr) call.bias_sum[row] = call.bias_sum[row] * factor + sums[1];
  }
  if (call.mean != nullptr && factor != 1.0f) {
    float* mean = call.mean + row * call.mean_stride;
    for (int64_t i = threadIdx.x; i < call.size; i += kThreads) mean[i] *= factor;
  }
}

}  // namespace

void exponential_rows(const ExponentialRows& call, cudaStream_t stream) {
  launch("exponential_rows", exponentials_kernel, static_cast<unsigned>(call.rows), kThreads, sizeof(Storage), stream,
         call);
}

}  // namespace softprompt
