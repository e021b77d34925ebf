// dK and dV of attention over [prompt ; own keys]. A block computes a tile of 64 keys, 16 a warp, and loops over the
// rows that see them.
//
//     dV = P^T dO,   dK = scale dS^T Q,   P and dS as in backward_dq.cu
//
// Scores are computed transposed, S^T = K Q^T, and so is dP^T = V dO^T. Their accumulators are then laid out as the A
// operands of the GEMMs for dV and dK, so lanes exchange nothing. Keys and values stay in shared memory. Tiles of
// queries and dO are double buffered: the next one is copied while this one is used.
//
// Own keys are seen by their own sequence only. Prompt keys are seen by every sequence that uses the prompt: one block
// loops over all of them and accumulates in fp32 registers. If that leaves multiprocessors idle, `splits` blocks share
// the row tiles. Each writes partial sums in fp32, and `attention_reduce_splits` adds them up in order.
//
// Grid: (own tiles + R * splits * prompt tiles, Hkv), in the order of kernels/triton/attention/backward_dkdv.py:
//
//     blockIdx.y   key head
//     blockIdx.x   if own gradients are needed, the first B * tiles_of(N) blocks:
//                      sequence * tiles_of(N) + tile
//                  then, for the prompts' gradients:
//                      (prompt * splits + split) * tiles_of(P) + tile
//
// Blocks are launched in about this order, x first. So blocks that run together share what they load through L2: the
// tiles of one split load the same rows, the splits of one prompt the same keys.
//
// FLOP: 8 D for each pair of a key and a row of a tile. Bytes: K, V, dK, dV once; Q and dO once for each tile of keys.
#include "cuda/attention/backward.h"
#include "cuda/attention/problem.h"
#include "cuda/attention/row_tile.cuh"
#include "cuda/launch.h"

namespace softprompt {
namespace {

constexpr int kBlockKeys = kWarps * kWarpRows;

template <class T, int kD>
struct BackwardDkdvStorage {
  // Limited by registers: the accumulators of dK, dV, S^T and dP^T.
  static constexpr int kBlockM = kD <= 64 ? 64 : 32;
  Tile<T, kBlockKeys, kD> key, value;  // at the end: dK and dV
  Tile<T, kBlockM, kD> query[2], grad_out[2];
  float lse[2][kBlockM], delta[2][kBlockM];  // of the rows of a tile; lse in units of log 2
};

// The keys of a block: a tile of one sequence's own keys or of one prompt's keys. For prompt keys, the block takes
// every splits-th tile of rows.
struct KeyBlock {
  bool own;
  int batch, prompt, kv_head;  // `batch`: of own keys, `prompt`: of prompt keys
  int first, tokens;           // first key of the tile, tokens of the whole tensor
  int split, splits;
};

__device__ __forceinline__ int tiles_of(int tokens) { return (tokens + kBlockKeys - 1) / kBlockKeys; }

// Decodes the grid described above.
__device__ __forceinline__ KeyBlock key_block(const AttentionProblem& problem, const AttentionBackward& backward) {
  const bool need_own = backward.gradients.key.data != nullptr || backward.gradients.value.data != nullptr;
  const int own_tiles = need_own ? tiles_of(problem.keys) * problem.batch : 0;
  const int kv_head = static_cast<int>(blockIdx.y);
  int index = blockIdx.x;
  if (index < own_tiles) {
    const int tiles = tiles_of(problem.keys);
    return {true, index / tiles, 0, kv_head, index % tiles * kBlockKeys, problem.keys, 0, 1};
  }
  index -= own_tiles;
  const int tiles = tiles_of(problem.prompt_keys), prompt_and_split = index / tiles;
  const int prompt = prompt_and_split / backward.splits, split = prompt_and_split % backward.splits;
  return {false, 0, prompt, kv_head, index % tiles * kBlockKeys, problem.prompt_keys, split, backward.splits};
}

// The tiles of rows of one sequence that see a block's keys.
template <int kBlockM>
struct RowTiles {
  int begin, end;           // rows
  int first_key, last_key;  // positions of the block's keys that exist
  int keys;                 // number of the block's keys that exist
  int count;                // tiles

  __device__ __forceinline__ RowTiles(const AttentionProblem& problem, const KeyBlock& block,
                                      const Sequence& sequence) {
    const int length = block.own ? sequence.key_length : sequence.prompt_length;
    const int first_position = block.own ? sequence.prompt_length : 0;
    keys = min(length - block.first, kBlockKeys);
    first_key = first_position + block.first;
    last_key = first_key + keys - 1;
    const Range seen_by = queries_that_see(problem, sequence, first_key, last_key);
    begin = seen_by.begin * problem.group;
    end = seen_by.end * problem.group;
    count = keys > 0 && end > begin ? (end - begin + kBlockM - 1) / kBlockM : 0;
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    backward_dkdv_kernel(const __grid_constant__ AttentionProblem problem,
                         const __grid_constant__ AttentionBackward backward) {
  using Storage = BackwardDkdvStorage<T, kD>;
  constexpr int kBlockM = Storage::kBlockM;
  auto& shared = arch::shared_storage<Storage>();
  const int lane = threadIdx.x % kWarpSize, t = lane % 4, row = threadIdx.x / kWarpSize * kWarpRows;
  const KeyBlock block = key_block(problem, backward);
  const Scoring scoring(problem);
  const AttentionGradients& gradients = backward.gradients;
  const bool need_key = (block.own ? gradients.key.data : gradients.prompt_key.data) != nullptr;
  const bool need_value = (block.own ? gradients.value.data : gradients.prompt_value.data) != nullptr;
  Accumulator<kD / 8> grad_key = {}, grad_value = {};

  // Keys beyond the sequence's length are loaded as zeros. A prompt has the same length in all sequences.
  bool loaded = false;
  const int last = block.own ? block.batch + 1 : problem.batch;
  for (int batch = block.own ? block.batch : 0; batch < last; ++batch) {
    if (!block.own && Sequence::prompt_of(problem, batch) != block.prompt) continue;
    const Sequence sequence(problem, batch);
    const RowTiles<kBlockM> tiles(problem, block, sequence);
    // Rotates the splits, so that many short sequences are not all work for the first block.
    const int first_tile = (block.split + batch) % block.splits;
    if (first_tile >= tiles.count) continue;
    if (!loaded) {
      loaded = true;
      const HeadTensor& keys = block.own ? problem.key : problem.prompt_key;
      const HeadTensor& values = block.own ? problem.value : problem.prompt_value;
      const int slot = block.own ? block.batch : block.prompt;
      const T* key = row_pointer<const T>(keys, slot, block.kv_head, block.first);
      const T* value = row_pointer<const T>(values, slot, block.kv_head, block.first);
      shared.key.copy_async([&](int r) -> const T* { return r < tiles.keys ? key + r * keys.token_stride : nullptr; });
      shared.value.copy_async(
          [&](int r) -> const T* { return r < tiles.keys ? value + r * values.token_stride : nullptr; });
    }
    const auto rows_of = [&](int index) {
      const int first = tiles.begin + (first_tile + index * block.splits) * kBlockM;
      return RowTile{batch, block.kv_head, first, tiles.end, problem.group};
    };
    const auto copy = [&](int index, int stage) {
      const RowTile rows = rows_of(index);
      shared.query[stage].copy_async([&](int r) -> const T* { return rows.pointer<const T>(problem.query, r); });
      shared.grad_out[stage].copy_async([&](int r) -> const T* { return rows.pointer<const T>(backward.grad_out, r); });
      arch::commit_copies();
      if (threadIdx.x < kBlockM) {
        float lse = kInfinity, delta = 0;  // all weights of a row that does not exist or sees no key are 0
        if (rows.contains(threadIdx.x)) {
          const int64_t at = rows.index(problem, threadIdx.x);
          const float natural_lse = backward.lse[at];
          if (natural_lse != -kInfinity) lse = natural_lse * kLog2e;
          delta = backward.delta[at];
        }
        shared.lse[stage][threadIdx.x] = lse;
        shared.delta[stage][threadIdx.x] = delta;
      }
    };

    copy(0, 0);
    for_each_tile((tiles.count - first_tile + block.splits - 1) / block.splits, copy, [&](int index, int stage) {
      const RowTile rows = rows_of(index);
      Accumulator<kBlockM / 8> weights = {}, grad_scores = {};
      gemm_abt<T>(weights, shared.key, row, shared.query[stage]);
      if (need_key) gemm_abt<T>(grad_scores, shared.value, row, shared.grad_out[stage]);
      const int first_query = sequence.offset + rows.query_of(0);
      const int last_query = sequence.offset + (min(rows.first + kBlockM, rows.end) - 1) / rows.group;
      const bool unmasked = tiles.keys == kBlockKeys &&
                            all_visible(problem, first_query, last_query, tiles.first_key, tiles.last_key);
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * j + 2 * t + i % 2;
          float score = scoring.score(weights[j][i]);
          if (!unmasked) {
            const int key = row + lane / 4 + i / 2 * 8;
            const int query = sequence.offset + rows.query_of(column);
            if (key >= tiles.keys || !is_visible(problem, query, tiles.first_key + key)) score = -kInfinity;
          }
          weights[j][i] = arch::exp2_fast(score - shared.lse[stage][column]);
          grad_scores[j][i] =
              weights[j][i] * (grad_scores[j][i] - shared.delta[stage][column]) * scoring.slope(score);
        }
      }
      if (need_value) gemm_ab<T>(grad_value, weights, shared.grad_out[stage]);
      if (need_key) gemm_ab<T>(grad_key, grad_scores, shared.query[stage]);
    });
  }

  // Every key of the tensor is written. Keys that no row sees get zeros.
  const int head = block.kv_head;
  if (!block.own && block.splits > 1) {
    const auto store_partials = [&](const Accumulator<kD / 8>& accumulator, float factor, float* partials) {
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = block.first + row + lane / 4 + 8 * half;
          if (token >= block.tokens) continue;
          const int64_t slot = block.split * static_cast<int64_t>(problem.prompts) + block.prompt;
          float* to = partials + ((slot * problem.kv_heads + head) * block.tokens + token) * kD + 8 * n + 2 * t;
          *reinterpret_cast<float2*>(to) = {accumulator[n][2 * half] * factor, accumulator[n][2 * half + 1] * factor};
        }
      }
    };
    if (need_key) store_partials(grad_key, problem.scale, backward.prompt_key_partials);
    if (need_value) store_partials(grad_value, 1.0f, backward.prompt_value_partials);
    return;
  }
  const int slot = block.own ? block.batch : block.prompt;
  const auto store = [&](const Accumulator<kD / 8>& accumulator, float factor, Tile<T, kBlockKeys, kD>& tile,
                         const HeadTensor& to) {
    store_rows<T>(accumulator, factor, factor, tile, row, [&](int r) -> T* {
      return block.first + r < block.tokens ? row_pointer<T>(to, slot, head, block.first + r) : nullptr;
    });
  };
  if (need_key) store(grad_key, problem.scale, shared.key, block.own ? gradients.key : gradients.prompt_key);
  if (need_value) store(grad_value, 1.0f, shared.value, block.own ? gradients.value : gradients.prompt_value);
}

constexpr int kReduceThreads = 128;

// partials [splits, R, Hkv, P, D] to gradients [R, Hkv, P, D]. Grid: (ceil(R Hkv P D / 4 / kReduceThreads), 2). A
// thread has 4 numbers. blockIdx.y is 0 for dK and 1 for dV.
template <class T, int kD>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_splits_kernel(const __grid_constant__ AttentionProblem problem,
                         const __grid_constant__ AttentionBackward backward) {
  const bool of_values = blockIdx.y == 1;
  const float* partials = of_values ? backward.prompt_value_partials : backward.prompt_key_partials;
  if (partials == nullptr) return;
  const int64_t tokens = problem.prompt_keys, heads = problem.kv_heads;
  const int64_t count = problem.prompts * heads * tokens * kD;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x) * 4;
  if (at >= count) return;
  float4 sum = {0, 0, 0, 0};
  for (int split = 0; split < backward.splits; ++split) {
    const float4 partial = *reinterpret_cast<const float4*>(partials + split * count + at);
    sum = {sum.x + partial.x, sum.y + partial.y, sum.z + partial.z, sum.w + partial.w};
  }
  const int64_t row = at / kD, token = row % tokens, head = row / tokens % heads, prompt = row / tokens / heads;
  const HeadTensor& out = of_values ? backward.gradients.prompt_value : backward.gradients.prompt_key;
  T* to = row_pointer<T>(out, prompt, head, token) + at % kD;
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
}

}  // namespace

void attention_backward_dkdv(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  const AttentionGradients& gradients = backward.gradients;
  const auto tiles = [](int64_t tokens) { return (tokens + kBlockKeys - 1) / kBlockKeys; };
  int64_t blocks = 0;
  if (gradients.key.data != nullptr || gradients.value.data != nullptr) blocks += tiles(problem.keys) * problem.batch;
  if (gradients.prompt_key.data != nullptr || gradients.prompt_value.data != nullptr) {
    blocks += tiles(problem.prompt_keys) * problem.prompts * backward.splits;
  }
  const dim3 grid(static_cast<unsigned>(blocks), problem.kv_heads);
  for_dtype_and_head_size(problem, [&](auto dtype, auto head_size) {
    using T = decltype(dtype);
    constexpr int kD = decltype(head_size)::value;
    launch("attention_backward_dkdv", backward_dkdv_kernel<T, kD>, grid, kAttentionThreads,
           sizeof(BackwardDkdvStorage<T, kD>), stream, problem, backward);
  });
}

void attention_reduce_splits(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(problem.prompts) * problem.kv_heads * problem.prompt_keys *
                        problem.head_size;
  const int64_t blocks = (count / 4 + kReduceThreads - 1) / kReduceThreads;
  const dim3 grid(static_cast<unsigned>(blocks), 2);
  for_dtype_and_head_size(problem, [&](auto dtype, auto head_size) {
    using T = decltype(dtype);
    constexpr int kD = decltype(head_size)::value;
    launch("attention_reduce_splits", reduce_splits_kernel<T, kD>, grid, kReduceThreads, 0, stream, problem, backward);
  });
}

void attention_backward(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  attention_backward_dq(problem, backward, stream);
  attention_backward_dkdv(problem, backward, stream);
  if (backward.splits > 1) attention_reduce_splits(problem, backward, stream);
}

}  // namespace softprompt
