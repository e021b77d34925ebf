// Attention over [prompt ; own keys], forward: FlashAttention-2's loop (Dao, 2023) over the tiles of both segments,
// with one online softmax.
//
// A block computes 64 rows of one sequence and key head, 16 a warp. Queries stay in registers. Tiles of keys and
// values are double buffered: the next one is copied while this one is used. Scores S = Q K^T and weights P = exp2(S -
// m) stay in registers: the accumulator layout of the first GEMM is the operand layout of the second. Tiles that no
// row sees are skipped. Tiles that every row sees completely are not masked.
//
// FLOP: 4 D for each pair of a row and a key of a tile. Bytes: Q, out and lse once; K and V once for each tile of rows.
#include "cuda/attention/problem.h"
#include "cuda/attention/row_tile.cuh"
#include "cuda/launch.h"

namespace softprompt {
namespace {

template <class T, int kD>
struct ForwardStorage {
  static constexpr int kBlockN = 64;
  Tile<T, kBlockRows, kD> query;  // at the end: out
  Tile<T, kBlockN, kD> key[2], value[2];
};

// Online softmax of the two rows that a lane holds columns of: row max m, and the sum of exp2(S - m) over the lane's
// own columns.
struct SoftmaxState {
  float row_max[2] = {-kInfinity, -kInfinity};
  float row_sum[2] = {0, 0};

  // Replaces scores by weights exp2(S - m). Returns the factors by which earlier sums of the two rows must be
  // multiplied.
  template <int kTiles>
  __device__ __forceinline__ float2 update(Accumulator<kTiles>& scores) {
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_max = row_max[half];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) new_max = fmaxf(new_max, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 2));
      const float base = new_max == -kInfinity ? 0.0f : new_max;  // no visible key yet
      factors[half] = arch::exp2_fast(row_max[half] - base);
      row_max[half] = new_max;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = arch::exp2_fast(scores[j][i] - base);
          sum += scores[j][i];
        }
      }
      row_sum[half] = row_sum[half] * factors[half] + sum;
    }
    return {factors[0], factors[1]};
  }

  // Adds up the sums of the lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum[half] += __shfl_xor_sync(kAllLanes, row_sum[half], 1);
      row_sum[half] += __shfl_xor_sync(kAllLanes, row_sum[half], 2);
    }
  }

  // Natural logarithm of a row's denominator, -inf if the row sees no key.
  __device__ __forceinline__ float lse(int half) const {
    return row_sum[half] == 0 ? -kInfinity : (row_max[half] + log2f(row_sum[half])) * kLn2;
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    forward_kernel(const __grid_constant__ AttentionProblem problem, const __grid_constant__ AttentionOutputs outputs) {
  using Storage = ForwardStorage<T, kD>;
  constexpr int kBlockN = Storage::kBlockN;
  auto& shared = arch::shared_storage<Storage>();
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x / kWarpSize * kWarpRows;
  const RowTile rows = row_tile_of_block(problem);
  const Sequence sequence(problem, rows.batch);
  const KeyTiles<kBlockN> tiles(problem, sequence, rows);
  const Scoring scoring(problem);
  const int count = tiles.count();
  const auto copy = [&](int index, int stage) {
    const auto tile = tiles[index];
    tiles.copy(shared.key[stage], tile, problem.prompt_key, problem.key);
    tiles.copy(shared.value[stage], tile, problem.prompt_value, problem.value);
    arch::commit_copies();
  };

  shared.query.copy_async([&](int r) -> const T* { return rows.pointer<const T>(problem.query, r); });
  arch::commit_copies();
  if (count > 0) copy(0, 0);
  count > 0 ? arch::wait_for_copies<1>() : arch::wait_for_copies<0>();
  __syncthreads();
  uint32_t query[kD / 16][4];
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) shared.query.load_a(query[k], row, k);

  SoftmaxState state;
  Accumulator<kD / 8> out_accumulator = {};
  for_each_tile(count, copy, [&](int index, int stage) {
    const auto& key = shared.key[stage];
    Accumulator<kBlockN / 8> scores = {};
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kBlockN / 16; ++j) {
        uint32_t b[4];
        key.load_b(b, 16 * j, k);
        arch::multiply_add<T>(scores[2 * j], query[k], b[0], b[1]);
        arch::multiply_add<T>(scores[2 * j + 1], query[k], b[2], b[3]);
      }
    }
    tiles.score(scores, tiles[index], scoring, row);
    const float2 factors = state.update<kBlockN / 8>(scores);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      out_accumulator[n][0] *= factors.x;
      out_accumulator[n][1] *= factors.x;
      out_accumulator[n][2] *= factors.y;
      out_accumulator[n][3] *= factors.y;
    }
    gemm_ab<T>(out_accumulator, scores, shared.value[stage]);
  });

  state.finish();
  if (lane % 4 == 0) {
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane / 4 + 8 * half;
      if (rows.contains(r)) outputs.lse[rows.index(problem, r)] = state.lse(half);
    }
  }
  const auto inverse = [](float row_sum) { return row_sum == 0 ? 0.0f : 1.0f / row_sum; };
  store_rows<T>(out_accumulator, inverse(state.row_sum[0]), inverse(state.row_sum[1]), shared.query, row,
                [&](int r) -> T* { return rows.pointer<T>(outputs.out, r); });
}

}  // namespace

void attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
  for_dtype_and_head_size(problem, [&](auto dtype, auto head_size) {
    using T = decltype(dtype);
    constexpr int kD = decltype(head_size)::value;
    launch("attention_forward", forward_kernel<T, kD>, row_tile_grid(problem), kAttentionThreads,
           sizeof(ForwardStorage<T, kD>), stream, problem, outputs);
  });
}

}  // namespace softprompt
