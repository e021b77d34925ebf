// dQ of attention over [prompt ; own keys], and delta, which both backward kernels use:
//
//     delta = rowsum(dO * O) - dlse
//     P = exp2(S - lse),  dS = P (dO V^T - delta),  dQ = scale dS K
//
// out and lse are those of both segments together. So the keys of both segments are treated alike and no merge is
// needed. S, dO V^T and dS stay in registers. Queries and dO stay in shared memory. Keys and values come in tiles as
// in the forward. The grid is the forward's: see row_tile.cuh.
//
// FLOP: 6 D for each pair of a row and a key of a tile. Bytes: Q, O, dO and dQ once; K and V once for each tile of
// rows.
#include "cuda/attention/problem.h"
#include "cuda/attention/backward.h"
#include "cuda/attention/row_tile.cuh"
#include "cuda/launch.h"

namespace softprompt {
namespace {

template <class T, int kD>
struct BackwardDqStorage {
  // Limited by registers (the accumulators of dQ, S and dP) and by shared memory (two blocks a multiprocessor).
  static constexpr int kBlockN = kD <= 64 ? 64 : 32;
  Tile<T, kBlockRows, kD> query;  // at the end: dQ
  Tile<T, kBlockRows, kD> grad_out;
  Tile<T, kBlockN, kD> key[2], value[2];
};

// Computes delta with two threads a row. The first of them writes it to global memory.
template <class T, int kD>
__device__ __forceinline__ void write_delta(const AttentionProblem& problem, const AttentionBackward& backward,
                                            const RowTile& rows, const Tile<T, kBlockRows, kD>& grad_out) {
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  const T* out = rows.pointer<const T>(backward.out, row);
  float sum = 0;
  if (out != nullptr) {
    for (int i = 0; i < kD / 16; ++i) {
      // Keeps the two threads of a row half the banks apart.
      const int chunk = half * (kD / 16) + (kD == 128 ? i + 4 * half : i) % (kD / 16);
      const uint4 out_chunk = *reinterpret_cast<const uint4*>(out + chunk * 8);
      const uint4 grad_out_chunk = *reinterpret_cast<const uint4*>(grad_out.at(row, chunk));
      const uint32_t out_pairs[4] = {out_chunk.x, out_chunk.y, out_chunk.z, out_chunk.w};
      const uint32_t grad_out_pairs[4] = {grad_out_chunk.x, grad_out_chunk.y, grad_out_chunk.z, grad_out_chunk.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 a = unpack<T>(out_pairs[k]), b = unpack<T>(grad_out_pairs[k]);
        sum += a.x * b.x + a.y * b.y;
      }
    }
  }
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  if (half == 0 && rows.contains(row)) {
    const int64_t at = rows.index(problem, row);
    backward.delta[at] = sum - (backward.grad_lse == nullptr ? 0.0f : backward.grad_lse[at]);
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    backward_dq_kernel(const __grid_constant__ AttentionProblem problem,
                       const __grid_constant__ AttentionBackward backward) {
  using Storage = BackwardDqStorage<T, kD>;
  constexpr int kBlockN = Storage::kBlockN;
  auto& shared = arch::shared_storage<Storage>();
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * kWarpRows;
  const RowTile rows = row_tile_of_block(problem);
  const Sequence sequence(problem, rows.batch);
  const KeyTiles<kBlockN> tiles(problem, sequence, rows);
  const Scoring scoring(problem);
  const int count = backward.gradients.query.data != nullptr ? tiles.count() : 0;
  const auto copy = [&](int index, int stage) {
    const auto tile = tiles[index];
    tiles.copy(shared.key[stage], tile, problem.prompt_key, problem.key);
    tiles.copy(shared.value[stage], tile, problem.prompt_value, problem.value);
    arch::commit_copies();
  };

  shared.query.copy_async([&](int r) -> const T* { return rows.pointer<const T>(problem.query, r); });
  shared.grad_out.copy_async([&](int r) -> const T* { return rows.pointer<const T>(backward.grad_out, r); });
  arch::commit_copies();
  if (count > 0) copy(0, 0);
  count > 0 ? arch::wait_for_copies<1>() : arch::wait_for_copies<0>();
  __syncthreads();
  write_delta(problem, backward, rows, shared.grad_out);
  if (backward.gradients.query.data == nullptr) return;  // all threads of the block
  __syncthreads();  // delta was written by other threads of this block

  float lse[2], delta[2];  // of the two rows that a lane holds columns of; lse in units of log 2
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane / 4 + 8 * half;
    lse[half] = kInfinity;
    delta[half] = 0;
    if (rows.contains(r)) {
      const int64_t at = rows.index(problem, r);
      const float natural_lse = backward.lse[at];
      if (natural_lse != -kInfinity) lse[half] = natural_lse * kLog2e;  // else the row sees no key: all weights are 0
      delta[half] = backward.delta[at];
    }
  }

  Accumulator<kD / 8> grad_query = {};
  for_each_tile(count, copy, [&](int index, int stage) {
    Accumulator<kBlockN / 8> scores = {}, grad_weights = {};
    gemm_abt<T>(scores, shared.query, row, shared.key[stage]);
    tiles.score(scores, tiles[index], scoring, row);
    gemm_abt<T>(grad_weights, shared.grad_out, row, shared.value[stage]);
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = arch::exp2_fast(scores[j][i] - lse[i / 2]);
        scores[j][i] = weight * (grad_weights[j][i] - delta[i / 2]) * scoring.slope(scores[j][i]);
      }
    }
    gemm_ab<T>(grad_query, scores, shared.key[stage]);
  });
  // The gradient of a row that sees no key is 0. Its dO, O and dlse may be NaN, which a weight of 0 does not remove.
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) grad_query[n][i] = lse[i / 2] == kInfinity ? 0.0f : grad_query[n][i];
  }
  store_rows<T>(grad_query, problem.scale, problem.scale, shared.query, row,
                [&](int r) -> T* { return rows.pointer<T>(backward.gradients.query, r); });
}

}  // namespace

void attention_backward_dq(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  for_dtype_and_head_size(problem, [&](auto dtype, auto head_size) {
    using T = decltype(dtype);
    constexpr int kD = decltype(head_size)::value;
    launch("attention_backward_dq", backward_dq_kernel<T, kD>, row_tile_grid(problem), kAttentionThreads,
           sizeof(BackwardDqStorage<T, kD>), stream, problem, backward);
  });
}

}  // namespace softprompt
