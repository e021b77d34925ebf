// A block's tile of rows, and the tiles of keys that it looks at: those of the prompt, then the sequence's own.
#pragma once

#include "cuda/attention/mask.cuh"
#include "cuda/attention/tile.cuh"

namespace softprompt {

template <class T>
__device__ __forceinline__ T* row_pointer(const HeadTensor& tensor, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + head * tensor.head + token * tensor.token;
}

// Rows of one sequence and key head.
struct Rows {
  int batch, kv_head, first, end;  // [first, end) of the M g rows
  int group;

  __device__ __forceinline__ bool exist(int row) const { return first + row < end; }
  __device__ __forceinline__ int query_of(int row) const { return (first + row) / group; }
  __device__ __forceinline__ int head_of(int row) const { return kv_head * group + (first + row) % group; }

  template <class T>
  __device__ __forceinline__ T* pointer(const HeadTensor& tensor, int row) const {
    return exist(row) ? row_pointer<T>(tensor, batch, head_of(row), query_of(row)) : nullptr;
  }

  // In a tensor [B, Hq, M].
  __device__ __forceinline__ int64_t index(const AttentionProblem& problem, int row) const {
    return (static_cast<int64_t>(batch) * problem.heads + head_of(row)) * problem.queries + query_of(row);
  }
};

// Tiles of kBlockN keys that rows look at, counted through both segments.
template <int kBlockN>
class KeyTiles {
 public:
  __device__ __forceinline__ KeyTiles(const AttentionProblem& problem, const Sequence& sequence, const Rows& rows)
      : problem_(problem), sequence_(sequence), rows_(rows) {
    first_query_ = sequence.offset + rows.first / rows.group;
    last_query_ = sequence.offset + (rows.end - 1) / rows.group;
    prompt_ = Segment(keys_seen(problem, {0, sequence.prompt_length}, first_query_, last_query_));
    own_ = Segment(keys_seen(problem, {sequence.prompt_length, sequence.key_length}, first_query_, last_query_));
  }

  __device__ __forceinline__ int count() const { return prompt_.count + own_.count; }

  struct One {
    bool own;
    int first, end;  // its first key, and where those that exist and are seen end
    int position;    // of its first key
    bool whole;      // all rows see all its keys
  };

  __device__ __forceinline__ One operator[](int index) const {
    const bool own = index >= prompt_.count;
    const int first = (own ? own_.begin : prompt_.begin) + (own ? index - prompt_.count : index) * kBlockN;
    const int position = own ? sequence_.prompt_length + first : first;
    const int exist = own ? sequence_.key_length : sequence_.prompt_length;
    const bool whole = first + kBlockN <= exist &&
                       all_seen(problem_, first_query_, last_query_, position, position + kBlockN - 1);
    return {own, first, own ? own_.end : prompt_.end, position, whole};
  }

  // Starts to copy a tile's keys, or values.
  template <class T, int kD>
  __device__ __forceinline__ void copy(Tile<T, kBlockN, kD>& tile, const One& one, const HeadTensor& prompt,
                                       const HeadTensor& own) const {
    const T* first = one.own ? row_pointer<T>(own, sequence_.batch, rows_.kv_head, one.first)
                             : row_pointer<T>(prompt, sequence_.prompt, rows_.kv_head, one.first);
    const int64_t stride = one.own ? own.token : prompt.token;
    tile.copy_async([&](int row) -> const T* { return one.first + row < one.end ? first + row * stride : nullptr; });
  }

  // Turns a warp's products into scores; -inf where a row does not see a key.
  __device__ __forceinline__ void score(Sums<kBlockN / 8>& sums, const One& one, const Scoring& scoring, int row) const {
    const int lane = threadIdx.x % kLanesOfWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = scoring.score(sums[j][i]);
    }
    if (one.whole) return;
    const int queries[2] = {sequence_.offset + rows_.query_of(row + g), sequence_.offset + rows_.query_of(row + g + 8)};
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * j + 2 * t + i % 2;
        if (one.first + key >= one.end || !sees(problem_, queries[i / 2], one.position + key)) sums[j][i] = -kNowhere;
      }
    }
  }

 private:
  // Keys of one segment that some row sees, in whole tiles.
  struct Segment {
    int begin = 0, end = 0;
    int count = 0;

    Segment() = default;
    __device__ __forceinline__ explicit Segment(const Range& seen) : begin(seen.begin / kBlockN * kBlockN), end(seen.end) {
      if (seen.end > seen.begin) count = (end - begin + kBlockN - 1) / kBlockN;
    }
  };

  const AttentionProblem& problem_;
  const Sequence& sequence_;
  const Rows& rows_;
  Segment prompt_, own_;
  int first_query_, last_query_;  // positions
};

// The rows that a block has: blockIdx.x counts tiles of all sequences, blockIdx.y key heads.
__device__ __forceinline__ Rows rows_of_block(const AttentionProblem& problem) {
  const int rows = problem.queries * problem.group, tiles = (rows + kBlockRows - 1) / kBlockRows;
  const int index = blockIdx.x, first = index % tiles * kBlockRows;
  return {index / tiles, static_cast<int>(blockIdx.y), first, min(first + kBlockRows, rows), problem.group};
}

inline dim3 grid_of_rows(const AttentionProblem& problem) {
  const int tiles = (problem.queries * problem.group + kBlockRows - 1) / kBlockRows;
  return dim3(static_cast<unsigned>(tiles) * problem.batch, problem.kv_heads);
}

// Calls go(T(), integral_constant<int, D>()) for the problem's dtype and head size.
template <class Go>
void for_kind(const AttentionProblem& problem, const Go& go) {
  const auto sized = [&](auto zero) {
    switch (problem.size) {
      case 64: return go(zero, std::integral_constant<int, 64>());
      case 96: return go(zero, std::integral_constant<int, 96>());
      case 128: return go(zero, std::integral_constant<int, 128>());
    }
  };
  problem.dtype == Dtype::bfloat16 ? sized(__nv_bfloat16()) : sized(__half());
}

}  // namespace softprompt
