// A tile of the vocabulary in a sweep over all of it: products to exponentials, with the state of an online softmax.
//
//     z = scale (product + bias),   m' = max(m, max z),   f = exp(m - m'),   e = exp(z - m')
//     total = f total + sum of e,   bias_total = f bias_total + sum of e bias,   mean = f mean
//
// The sum of e W is a matrix product's to add, of e in the dtype of W. Where that has 16 bits, e is written in two parts,
// e rounded and what the rounding lost, whose products with W together are as good as one with 16 bits of mantissa.
//
// A block has a row. It reads the row's part of the tile twice, the second time while it is in a cache, and rescales the
// row's mean only where m has moved. One exponential a word.
#include "cuda/arch.cuh"
#include "cuda/block_reduce.cuh"
#include "cuda/losses/kl.h"
#include "cuda/elementwise.cuh"
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"

namespace softprompt {
namespace {

constexpr int kThreads = 256;

struct Storage {
  BlockScratch<2, kThreads> scratch;
};

struct Words {
  const ExponentialRows& call;
  NumberRow products, bias;
  int shift;

  __device__ __forceinline__ Words(const ExponentialRows& call_, int64_t row)
      : call(call_),
        products(call.products, Dtype::float32, row, call.products_stride, 1),
        bias(call.bias, Dtype::float32, 0, 0, 1) {
    shift = products.wanted_shift();
    products.cut(shift);
    bias.cut(shift);
  }

  __device__ __forceinline__ int64_t groups() const { return (call.columns + shift + kGroup - 1) / kGroup; }

  // z of a group, -inf where there is no word, and the bias, 0 where it removes a word.
  __device__ __forceinline__ void load(int64_t first, float (&z)[kGroup], float (&b)[kGroup]) const {
    products.load(first, call.columns, 0.0f, z);
    if (bias.data != nullptr) bias.load(first, call.columns, 0.0f, b);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int64_t at = first + i;
      // Apart from the sum, so that a scale of any sign leaves it removed.
      const bool removed = at < 0 || at >= call.columns || (bias.data != nullptr && b[i] == -kInfinity);
      if (bias.data == nullptr || removed) b[i] = 0;
      z[i] = removed ? -kInfinity : (z[i] + b[i]) * call.scale;
    }
  }
};

__global__ void __launch_bounds__(kThreads) exponentials_kernel(const __grid_constant__ ExponentialRows call) {
  auto& shared = arch::shared_storage<Storage>();
  const int64_t row = blockIdx.x;
  const bool kept = call.weights == nullptr || call.weights[row] != 0;
  const Words words(call, row);
  float z[kGroup], b[kGroup];

  if (kept && call.label_logit != nullptr && threadIdx.x == 0) {  // read before any e takes its place: see the barriers
    const int64_t label = call.labels[row] - call.first;
    if (label >= 0 && label < call.columns) {
      const float added = call.bias == nullptr ? 0.0f : call.bias[label];
      const float z = (call.products[row * call.products_stride + label] + added) * call.scale;
      call.label_logit[row] = added == -kInfinity ? -kInfinity : z;
    }
  }

  float found[2] = {-kInfinity, -kInfinity};
  if (kept) {
    for (int64_t group = threadIdx.x; group < words.groups(); group += kThreads) {
      words.load(group * kGroup - words.shift, z, b);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) found[0] = fmaxf(found[0], z[i]);
    }
  }
  largest_of_block(found, shared.scratch);
  const float before = kept ? call.largest[row] : 0.0f;
  const float after = fmaxf(before, found[0]);
  const float base = after == -kInfinity ? 0.0f : after;  // no word yet

  NumberRow high(call.high, call.part_dtype, row, call.high_stride, 1);
  NumberRow low(call.low, call.part_dtype, row, call.low_stride, 1);
  high.cut(words.shift);
  low.cut(words.shift);
  float sums[2] = {};
  for (int64_t group = words.groups() - 1 - threadIdx.x; group >= 0; group -= kThreads) {
    const int64_t first = group * kGroup - words.shift;
    float e[kGroup] = {};
    if (kept) {
      words.load(first, z, b);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
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
        for (int i = 0; i < kGroup; ++i) {
          const float rounded = call.part_dtype == Dtype::bfloat16 ? __bfloat162float(__float2bfloat16_rn(e[i]))
                                                                   : __half2float(__float2half_rn(e[i]));
          e[i] -= rounded;
        }
        low.store(first, call.columns, e);
      }
    }
  }
  if (!kept) return;  // the block together
  sum_block(sums, shared.scratch);
  const float factor = before == after ? 1.0f : before == -kInfinity ? 0.0f : exp_fast(before - base);
  if (threadIdx.x == 0) {
    call.largest[row] = after;
    call.total[row] = call.total[row] * factor + sums[0];
    if (call.bias_total != nullptr) call.bias_total[row] = call.bias_total[row] * factor + sums[1];
  }
  if (call.mean != nullptr && factor != 1.0f) {
    float* mean = call.mean + row * call.mean_stride;
    for (int64_t i = threadIdx.x; i < call.size; i += kThreads) mean[i] *= factor;
  }
}

}  // namespace

void exponential_rows(const ExponentialRows& call, cudaStream_t stream) {
  launch("exponential_rows", exponentials_kernel, static_cast<unsigned>(call.rows), kThreads, sizeof(Storage), stream, call);
}

}  // namespace softprompt
