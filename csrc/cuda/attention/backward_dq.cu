// dQ of attention over [prompt ; own keys], and what both backward kernels need of a row:
//
//     delta = rowsum(dO * O) - dlse
//     P = exp2(S - lse),  dS = P (dO V^T - delta),  dQ = scale dS K
//
// With the joint out and lse each segment's keys are treated alike, and no merge is needed. S, dO V^T and dS stay in
// registers; queries and dO stay in shared memory, and keys and values come in tiles as in the forward.
//
// FLOP: 6 D for each pair of a row and a key of a tile. Bytes: Q, O, dO and dQ once; K and V once for each tile of rows.
#include "cuda/attention/problem.h"
#include "cuda/attention/backward.h"
#include "cuda/attention/row_tile.cuh"
#include "cuda/launch.h"

namespace softprompt {
namespace {

template <class T, int kD>
struct QueryStorage {
  static constexpr int kBlockN = kD <= 64 ? 64 : 32;  // registers: dQ and two tiles of products; two blocks' shared memory
  Tile<T, kBlockRows, kD> query;                      // at the end, dQ
  Tile<T, kBlockRows, kD> grad_out;
  Tile<T, kBlockN, kD> key[2], value[2];
};

// Two threads a row: delta, which the first of them also writes to global memory.
template <class T, int kD>
__device__ __forceinline__ void write_delta(const AttentionProblem& problem, const AttentionBackward& backward,
                                            const Rows& rows, const Tile<T, kBlockRows, kD>& grad_out) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  const T* out = rows.pointer<const T>(backward.out, row);
  float sum = 0;
  if (out != nullptr) {
    for (int i = 0; i < kD / 16; ++i) {
      // The halves of a row are half the banks apart.
      const int chunk = half * (kD / 16) + (kD == 128 ? i + 4 * half : i) % (kD / 16);
      const uint4 left = *reinterpret_cast<const uint4*>(out + chunk * 8);
      const uint4 right = *reinterpret_cast<const uint4*>(grad_out.at(row, chunk));
      const uint32_t lefts[4] = {left.x, left.y, left.z, left.w}, rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 a = unpack<T>(lefts[k]), b = unpack<T>(rights[k]);
        sum += a.x * b.x + a.y * b.y;
      }
    }
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  if (half == 0 && rows.exist(row)) {
    const int64_t at = rows.index(problem, row);
    backward.delta[at] = sum - (backward.grad_lse == nullptr ? 0.0f : backward.grad_lse[at]);
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    query_gradient_kernel(const __grid_constant__ AttentionProblem problem, const __grid_constant__ AttentionBackward backward) {
  using Storage = QueryStorage<T, kD>;
  constexpr int kBlockN = Storage::kBlockN;
  auto& shared = arch::shared_storage<Storage>();
  const int lane = threadIdx.x % kLanesOfWarp, row = threadIdx.x / kLanesOfWarp * kWarpRows;
  const Rows rows = rows_of_block(problem);
  const Sequence sequence(problem, rows.batch);
  const KeyTiles<kBlockN> tiles(problem, sequence, rows);
  const Scoring scoring(problem);
  const int count = backward.gradients.query.data != nullptr ? tiles.count() : 0;
  const auto copy = [&](int index, int stage) {
    const auto one = tiles[index];
    tiles.copy(shared.key[stage], one, problem.prompt_key, problem.key);
    tiles.copy(shared.value[stage], one, problem.prompt_value, problem.value);
    arch::commit_copies();
  };

  shared.query.copy_async([&](int r) -> const T* { return rows.pointer<const T>(problem.query, r); });
  shared.grad_out.copy_async([&](int r) -> const T* { return rows.pointer<const T>(backward.grad_out, r); });
  arch::commit_copies();
  if (count > 0) copy(0, 0);
  count > 0 ? arch::wait_for_copies<1>() : arch::wait_for_copies<0>();
  __syncthreads();
  write_delta(problem, backward, rows, shared.grad_out);
  if (backward.gradients.query.data == nullptr) return;  // the block together
  __syncthreads();  // before delta, which other threads of this block have written, is read

  float lse[2], delta[2];  // of the two rows that a lane has a part of; in units of log 2
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane / 4 + 8 * half;
    lse[half] = kNowhere;
    delta[half] = 0;
    if (rows.exist(r)) {
      const int64_t at = rows.index(problem, r);
      const float natural = backward.lse[at];
      if (natural != -kNowhere) lse[half] = natural * kLog2OfE;  // else no key is seen: all weights are 0
      delta[half] = backward.delta[at];
    }
  }

  Sums<kD / 8> gradient = {};
  for_each_tile(count, copy, [&](int index, int stage) {
    Sums<kBlockN / 8> scores = {}, by_weights = {};
    add_scores<T>(scores, shared.query, row, shared.key[stage]);
    tiles.score(scores, tiles[index], scoring, row);
    add_scores<T>(by_weights, shared.grad_out, row, shared.value[stage]);
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = arch::exp2_fast(scores[j][i] - lse[i / 2]);
        scores[j][i] = weight * (by_weights[j][i] - delta[i / 2]) * scoring.slope(scores[j][i]);
      }
    }
    add_weighted<T>(gradient, scores, shared.key[stage]);
  });
  // Rows that see no key have no gradient, though their dO, O and dlse may be NaN, which a weight of 0 does not remove.
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) gradient[n][i] = lse[i / 2] == kNowhere ? 0.0f : gradient[n][i];
  }
  store_rows<T>(gradient, problem.scale, problem.scale, shared.query, row,
                [&](int r) -> T* { return rows.pointer<T>(backward.gradients.query, r); });
}

}  // namespace

void attention_query_gradient(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  for_kind(problem, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kD = decltype(size)::value;
    launch("attention_query_gradient", query_gradient_kernel<T, kD>, grid_of_rows(problem), kAttentionThreads,
           sizeof(QueryStorage<T, kD>), stream, problem, backward);
  });
}

}  // namespace softprompt
