// dK and dV of attention over [prompt ; own keys]: a block has 64 keys, 16 a warp, and goes through the rows that see them.
//
//     dV = P^T dO,   dK = scale dS^T Q,   P and dS as in backward_dq.cu
//
// Scores are made transposed, S^T = K Q^T, and so is dP^T = V dO^T: what these products leave in a lane are then the left
// operands that dV and dK take, and nothing is passed between lanes. Keys and values stay in shared memory; queries and
// dO of the rows come in tiles, the next on its way while this one is worked on.
//
// Own keys are seen by their sequence alone. A prompt's keys are seen by every sequence that has it: one block goes
// through all of them and adds up in registers, in fp32; where that leaves multiprocessors idle, `splits` blocks share
// the tiles of rows and leave parts in fp32, which `attention_fold` adds up in order.
//
// FLOP: 8 D for each pair of a key and a row of a tile. Bytes: K, V, dK and dV once; Q and dO once for each tile of keys.
#include "cuda/attention/problem.h"
#include "cuda/attention/backward.h"
#include "cuda/attention/row_tile.cuh"
#include "cuda/launch.h"

namespace softprompt {
namespace {

constexpr int kBlockKeys = kWarps * kWarpRows;

template <class T, int kD>
struct KeyStorage {
  static constexpr int kBlockM = kD <= 64 ? 64 : 32;  // registers: dK, dV and two tiles of products
  Tile<T, kBlockKeys, kD> key, value;                 // at the end, dK and dV
  Tile<T, kBlockM, kD> query[2], grad_out[2];
  float lse[2][kBlockM], delta[2][kBlockM];           // of the rows of a tile; in units of log 2
};

// A block's keys: a tile of one sequence's own, or of one prompt, of which it may have only each splits-th tile of rows.
struct KeyBlock {
  bool own;
  int batch, prompt, kv_head;  // `batch` of own keys
  int first, tokens;           // of all tokens of the tensor
  int part, parts;
};

__device__ __forceinline__ int tiles_of(int tokens) { return (tokens + kBlockKeys - 1) / kBlockKeys; }

// blockIdx.x counts own tiles of all sequences, if they are needed, then parts, prompts and their tiles.
__device__ __forceinline__ KeyBlock key_block(const AttentionProblem& problem, const AttentionBackward& backward) {
  const bool need_own = backward.gradients.key.data != nullptr || backward.gradients.value.data != nullptr;
  const int own_tiles = need_own ? tiles_of(problem.keys) * problem.batch : 0;
  int index = blockIdx.x;
  if (index < own_tiles) {
    const int tiles = tiles_of(problem.keys);
    return {true, index / tiles, 0, static_cast<int>(blockIdx.y), index % tiles * kBlockKeys, problem.keys, 0, 1};
  }
  index -= own_tiles;
  const int tiles = tiles_of(problem.prompt_keys), rest = index / tiles;
  return {false, 0, rest % problem.prompts, static_cast<int>(blockIdx.y), index % tiles * kBlockKeys, problem.prompt_keys,
          rest / problem.prompts, backward.splits};
}

// Tiles of rows of one sequence that see a block's keys.
template <int kBlockM>
struct RowTiles {
  int begin, end;           // rows
  int first_key, last_key;  // positions of the block's keys that exist
  int keys;                 // of the block that exist
  int count;

  __device__ __forceinline__ RowTiles(const AttentionProblem& problem, const KeyBlock& block, const Sequence& sequence) {
    const int exist = block.own ? sequence.key_length : sequence.prompt_length;
    const int shift = block.own ? sequence.prompt_length : 0;
    keys = min(exist - block.first, kBlockKeys);
    first_key = shift + block.first;
    last_key = first_key + keys - 1;
    const Range seen = queries_seeing(problem, sequence, first_key, last_key);
    begin = seen.begin * problem.group;
    end = seen.end * problem.group;
    count = keys > 0 && end > begin ? (end - begin + kBlockM - 1) / kBlockM : 0;
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_gradients_kernel(const __grid_constant__ AttentionProblem problem, const __grid_constant__ AttentionBackward backward) {
  using Storage = KeyStorage<T, kD>;
  constexpr int kBlockM = Storage::kBlockM;
  auto& shared = arch::shared_storage<Storage>();
  const int lane = threadIdx.x % kLanesOfWarp, t = lane % 4, row = threadIdx.x / kLanesOfWarp * kWarpRows;
  const KeyBlock block = key_block(problem, backward);
  const Scoring scoring(problem);
  const AttentionGradients& wanted = backward.gradients;
  const bool need_key = (block.own ? wanted.key.data : wanted.prompt_key.data) != nullptr;
  const bool need_value = (block.own ? wanted.value.data : wanted.prompt_value.data) != nullptr;
  Sums<kD / 8> grad_key = {}, grad_value = {};

  bool loaded = false;  // keys and values: rows beyond the sequence's length are zeros, for prompts in all sequences
  const int last = block.own ? block.batch + 1 : problem.batch;
  for (int member = block.own ? block.batch : 0; member < last; ++member) {
    if (!block.own && Sequence::prompt_of(problem, member) != block.prompt) continue;
    const Sequence sequence(problem, member);
    const RowTiles<kBlockM> tiles(problem, block, sequence);
    // So that the parts of many short sequences are not all the first.
    const int turn = (block.part + member) % block.parts;
    if (turn >= tiles.count) continue;
    if (!loaded) {
      loaded = true;
      const HeadTensor& keys = block.own ? problem.key : problem.prompt_key;
      const HeadTensor& values = block.own ? problem.value : problem.prompt_value;
      const int batch = block.own ? block.batch : block.prompt;
      const T* key = row_pointer<const T>(keys, batch, block.kv_head, block.first);
      const T* value = row_pointer<const T>(values, batch, block.kv_head, block.first);
      shared.key.copy_async([&](int r) -> const T* { return r < tiles.keys ? key + r * keys.token : nullptr; });
      shared.value.copy_async([&](int r) -> const T* { return r < tiles.keys ? value + r * values.token : nullptr; });
    }
    const auto rows_of = [&](int index) {
      const int first = tiles.begin + (turn + index * block.parts) * kBlockM;
      return Rows{member, block.kv_head, first, tiles.end, problem.group};
    };
    const auto copy = [&](int index, int stage) {
      const Rows rows = rows_of(index);
      shared.query[stage].copy_async([&](int r) -> const T* { return rows.pointer<const T>(problem.query, r); });
      shared.grad_out[stage].copy_async([&](int r) -> const T* { return rows.pointer<const T>(backward.grad_out, r); });
      arch::commit_copies();
      if (threadIdx.x < kBlockM) {
        float lse = kNowhere, delta = 0;  // without a key, or without a row, all weights are 0
        if (rows.exist(threadIdx.x)) {
          const int64_t at = rows.index(problem, threadIdx.x);
          const float natural = backward.lse[at];
          if (natural != -kNowhere) lse = natural * kLog2OfE;
          delta = backward.delta[at];
        }
        shared.lse[stage][threadIdx.x] = lse;
        shared.delta[stage][threadIdx.x] = delta;
      }
    };

    copy(0, 0);
    for_each_tile((tiles.count - turn + block.parts - 1) / block.parts, copy, [&](int index, int stage) {
      const Rows rows = rows_of(index);
      Sums<kBlockM / 8> weights = {}, by_scores = {};
      add_scores<T>(weights, shared.key, row, shared.query[stage]);
      if (need_key) add_scores<T>(by_scores, shared.value, row, shared.grad_out[stage]);
      const int first_query = sequence.offset + rows.query_of(0);
      const int last_query = sequence.offset + (min(rows.first + kBlockM, rows.end) - 1) / rows.group;
      const bool whole = tiles.keys == kBlockKeys && all_seen(problem, first_query, last_query, tiles.first_key, tiles.last_key);
#pragma unroll
      for (int j = 0; j < kBlockM / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * j + 2 * t + i % 2;
          float score = scoring.score(weights[j][i]);
          if (!whole) {
            const int key = row + lane / 4 + i / 2 * 8;
            const int query = sequence.offset + rows.query_of(column);
            if (key >= tiles.keys || !sees(problem, query, tiles.first_key + key)) score = -kNowhere;
          }
          weights[j][i] = arch::exp2_fast(score - shared.lse[stage][column]);
          by_scores[j][i] = weights[j][i] * (by_scores[j][i] - shared.delta[stage][column]) * scoring.slope(score);
        }
      }
      if (need_value) add_weighted<T>(grad_value, weights, shared.grad_out[stage]);
      if (need_key) add_weighted<T>(grad_key, by_scores, shared.query[stage]);
    });
  }

  // Keys that exist in the tensor are all written, those that nobody sees with zeros.
  const int head = block.kv_head;
  if (!block.own && block.parts > 1) {
    const auto store = [&](const Sums<kD / 8>& sums, float factor, float* parts) {
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = block.first + row + lane / 4 + 8 * half;
          if (token >= block.tokens) continue;
          const int64_t prompt = block.part * static_cast<int64_t>(problem.prompts) + block.prompt;
          float* to = parts + ((prompt * problem.kv_heads + head) * block.tokens + token) * kD + 8 * n + 2 * t;
          *reinterpret_cast<float2*>(to) = {sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor};
        }
      }
    };
    if (need_key) store(grad_key, problem.scale, backward.prompt_key_parts);
    if (need_value) store(grad_value, 1.0f, backward.prompt_value_parts);
    return;
  }
  const int batch = block.own ? block.batch : block.prompt;
  const auto store = [&](const Sums<kD / 8>& sums, float factor, Tile<T, kBlockKeys, kD>& tile, const HeadTensor& to) {
    store_rows<T>(sums, factor, factor, tile, row, [&](int r) -> T* {
      return block.first + r < block.tokens ? row_pointer<T>(to, batch, head, block.first + r) : nullptr;
    });
  };
  if (need_key) store(grad_key, problem.scale, shared.key, block.own ? wanted.key : wanted.prompt_key);
  if (need_value) store(grad_value, 1.0f, shared.value, block.own ? wanted.value : wanted.prompt_value);
}

constexpr int kFoldThreads = 128;

// parts [splits, rows, kD] to rows of [R, Hkv, P, D]; a thread has 4 numbers.
template <class T, int kD>
__global__ void __launch_bounds__(kFoldThreads)
    fold_kernel(const __grid_constant__ AttentionProblem problem, const __grid_constant__ AttentionBackward backward) {
  const bool of_values = blockIdx.y == 1;
  const float* parts = of_values ? backward.prompt_value_parts : backward.prompt_key_parts;
  if (parts == nullptr) return;
  const int64_t tokens = problem.prompt_keys, heads = problem.kv_heads;
  const int64_t count = problem.prompts * heads * tokens * kD;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kFoldThreads + threadIdx.x) * 4;
  if (at >= count) return;
  float4 sum = {0, 0, 0, 0};
  for (int part = 0; part < backward.splits; ++part) {
    const float4 one = *reinterpret_cast<const float4*>(parts + part * count + at);
    sum = {sum.x + one.x, sum.y + one.y, sum.z + one.z, sum.w + one.w};
  }
  const int64_t row = at / kD, token = row % tokens, head = row / tokens % heads, prompt = row / tokens / heads;
  const HeadTensor& out = of_values ? backward.gradients.prompt_value : backward.gradients.prompt_key;
  T* to = row_pointer<T>(out, prompt, head, token) + at % kD;
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
}

}  // namespace

void attention_key_gradients(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  const AttentionGradients& wanted = backward.gradients;
  const auto tiles = [](int64_t tokens) { return (tokens + kBlockKeys - 1) / kBlockKeys; };
  int64_t blocks = 0;
  if (wanted.key.data != nullptr || wanted.value.data != nullptr) blocks += tiles(problem.keys) * problem.batch;
  if (wanted.prompt_key.data != nullptr || wanted.prompt_value.data != nullptr) {
    blocks += tiles(problem.prompt_keys) * problem.prompts * backward.splits;
  }
  for_kind(problem, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kD = decltype(size)::value;
    launch("attention_key_gradients", key_gradients_kernel<T, kD>, dim3(static_cast<unsigned>(blocks), problem.kv_heads),
           kAttentionThreads, sizeof(KeyStorage<T, kD>), stream, problem, backward);
  });
}

void attention_fold(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(problem.prompts) * problem.kv_heads * problem.prompt_keys * problem.size;
  const int64_t blocks = (count / 4 + kFoldThreads - 1) / kFoldThreads;
  for_kind(problem, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kD = decltype(size)::value;
    launch("attention_fold", fold_kernel<T, kD>, dim3(static_cast<unsigned>(blocks), 2), kFoldThreads, 0, stream, problem,
           backward);
  });
}

void attention_backward(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream) {
  attention_query_gradient(problem, backward, stream);
  attention_key_gradients(problem, backward, stream);
  if (backward.splits > 1) attention_fold(problem, backward, stream);
}

}  // namespace softprompt
