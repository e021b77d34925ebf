// Attention over [prompt ; own keys], forward: FlashAttention-2's loop (Dao, 2023) over tiles of both segments, with one
// online softmax.
//
// A block has 64 rows of a sequence and a key head, 16 a warp. Its queries stay in registers; keys and values come in
// tiles, the next one on its way while this one is worked on. Scores S = Q K^T and weights P = exp2(S - m) stay in
// registers: what a product leaves in a lane is what the next one takes from it. Tiles that no row sees are left out,
// and tiles that every row sees whole are not masked.
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
  Tile<T, kBlockRows, kD> query;  // at the end, out
  Tile<T, kBlockN, kD> key[2], value[2];
};

// Maximum and sum of a row's exponentials, of the two rows that a lane has a part of; the sum is the lane's own part.
struct SoftmaxState {
  float largest[2] = {-kNowhere, -kNowhere};
  float total[2] = {0, 0};

  // Makes weights of scores, and returns by what to multiply what was summed before.
  template <int kTiles>
  __device__ __forceinline__ float2 update(Sums<kTiles>& scores) {
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) most = fmaxf(most, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float base = most == -kNowhere ? 0.0f : most;  // no key yet
      factors[half] = arch::exp2_fast(largest[half] - base);
      largest[half] = most;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = arch::exp2_fast(scores[j][i] - base);
          sum += scores[j][i];
        }
      }
      total[half] = total[half] * factors[half] + sum;
    }
    return {factors[0], factors[1]};
  }

  // The whole rows' sums.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    }
  }

  // Natural logarithm of a row's denominator; -inf without a key.
  __device__ __forceinline__ float lse(int half) const {
    return total[half] == 0 ? -kNowhere : (largest[half] + log2f(total[half])) * kLn2;
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    forward_kernel(const __grid_constant__ AttentionProblem problem, const __grid_constant__ AttentionOutputs outputs) {
  using Storage = ForwardStorage<T, kD>;
  constexpr int kBlockN = Storage::kBlockN;
  auto& shared = arch::shared_storage<Storage>();
  const int lane = threadIdx.x % kLanesOfWarp, row = threadIdx.x / kLanesOfWarp * kWarpRows;
  const Rows rows = rows_of_block(problem);
  const Sequence sequence(problem, rows.batch);
  const KeyTiles<kBlockN> tiles(problem, sequence, rows);
  const Scoring scoring(problem);
  const int count = tiles.count();
  const auto copy = [&](int index, int stage) {
    const auto one = tiles[index];
    tiles.copy(shared.key[stage], one, problem.prompt_key, problem.key);
    tiles.copy(shared.value[stage], one, problem.prompt_value, problem.value);
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
  Sums<kD / 8> out = {};
  for_each_tile(count, copy, [&](int index, int stage) {
    const auto& key = shared.key[stage];
    Sums<kBlockN / 8> scores = {};
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
      out[n][0] *= factors.x;
      out[n][1] *= factors.x;
      out[n][2] *= factors.y;
      out[n][3] *= factors.y;
    }
    add_weighted<T>(out, scores, shared.value[stage]);
  });

  state.finish();
  if (lane % 4 == 0) {
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane / 4 + 8 * half;
      if (rows.exist(r)) outputs.lse[rows.index(problem, r)] = state.lse(half);
    }
  }
  const auto inverse = [](float total) { return total == 0 ? 0.0f : 1.0f / total; };
  store_rows<T>(out, inverse(state.total[0]), inverse(state.total[1]), shared.query, row,
                [&](int r) -> T* { return rows.pointer<T>(outputs.out, r); });
}

}  // namespace

void attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
  for_kind(problem, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kD = decltype(size)::value;
    launch("attention_forward", forward_kernel<T, kD>, grid_of_rows(problem), kAttentionThreads,
           sizeof(ForwardStorage<T, kD>), stream, problem, outputs);
  });
}

}  // namespace softprompt
