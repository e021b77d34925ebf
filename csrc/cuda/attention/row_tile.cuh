// The tile of rows of a block, and the tiles of keys that it visits: first the prompt's, then the sequence's own.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/attention/mask.cuh"
#include "cuda/attention/tile.cuh"

namespace softprompt {

template <class T>
__device__ __forceinline__ T* row_pointer(const HeadTensor& tensor, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride +
         token * tensor.token_stride;
}

// A tile of rows of one sequence and key head. Methods take the row's index in the tile.
struct RowTile {
  int batch, kv_head, first, end;  // rows [first, end) of the M g rows
  int group;

  __device__ __forceinline__ bool contains(int row) const { return first + row < end; }
  __device__ __forceinline__ int query_of(int row) const { return (first + row) / group; }
  __device__ __forceinline__ int head_of(int row) const { return kv_head * group + (first + row) % group; }

  // The row in a tensor [B, Hq, M, D], nullptr beyond the end.
  template <class T>
  __device__ __forceinline__ T* pointer(const HeadTensor& tensor, int row) const {
    return contains(row) ? row_pointer<T>(tensor, batch, head_of(row), query_of(row)) : nullptr;
  }

  // The row's index in a dense tensor [B, Hq, M].
  __device__ __forceinline__ int64_t index(const AttentionProblem& problem, int row) const {
    return (static_cast<int64_t>(batch) * problem.heads + head_of(row)) * problem.queries + query_of(row);
  }
};

struct KeyTile {
  bool own;        // own keys, else prompt keys
  int first, end;  // its first key, and the end of the visible keys of its segment
  int position;    // of its first key
  bool unmasked;   // all its keys exist and every row sees them
};

// The tiles of kBlockN keys that at least one row sees, numbered through both segments.
template <int kBlockN>
class KeyTiles {
 public:
  __device__ __forceinline__ KeyTiles(const AttentionProblem& problem, const Sequence& sequence, const RowTile& rows)
      : problem_(problem), sequence_(sequence), rows_(rows) {
    first_query_ = sequence.offset + rows.first / rows.group;
    last_query_ = sequence.offset + (rows.end - 1) / rows.group;
    const int prompt_length = sequence.prompt_length;
    prompt_ = TileRange(visible_keys(problem, {0, prompt_length}, first_query_, last_query_));
    own_ = TileRange(visible_keys(problem, {prompt_length, sequence.key_length}, first_query_, last_query_));
  }

  __device__ __forceinline__ int count() const { return prompt_.count + own_.count; }

  __device__ __forceinline__ KeyTile operator[](int index) const {
    const bool own = index >= prompt_.count;
    const int first = (own ? own_.begin : prompt_.begin) + (own ? index - prompt_.count : index) * kBlockN;
    const int position = own ? sequence_.prompt_length + first : first;
    const int length = own ? sequence_.key_length : sequence_.prompt_length;
    const bool unmasked = first + kBlockN <= length &&
                          all_visible(problem_, first_query_, last_query_, position, position + kBlockN - 1);
    return {own, first, own ? own_.end : prompt_.end, position, unmasked};
  }

  // Starts the asynchronous copy of a tile's keys, or of its values.
  template <class T, int kD>
  __device__ __forceinline__ void copy(Tile<T, kBlockN, kD>& to, const KeyTile& tile, const HeadTensor& prompt,
                                       const HeadTensor& own) const {
    const T* first = tile.own ? row_pointer<T>(own, sequence_.batch, rows_.kv_head, tile.first)
                              : row_pointer<T>(prompt, sequence_.prompt, rows_.kv_head, tile.first);
    const int64_t stride = tile.own ? own.token_stride : prompt.token_stride;
    to.copy_async([&](int row) -> const T* { return tile.first + row < tile.end ? first + row * stride : nullptr; });
  }

  // Turns a warp's dot products of rows from `row` with a tile's keys into scores: -inf where a row does not see a key.
  __device__ __forceinline__ void score(Accumulator<kBlockN / 8>& scores, const KeyTile& tile, const Scoring& scoring,
                                        int row) const {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[j][i] = scoring.score(scores[j][i]);
    }
    if (tile.unmasked) return;
    const int queries[2] = {sequence_.offset + rows_.query_of(row + g), sequence_.offset + rows_.query_of(row + g + 8)};
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * j + 2 * t + i % 2;
        const bool exists = tile.first + key < tile.end;
        if (!exists || !is_visible(problem_, queries[i / 2], tile.position + key)) scores[j][i] = -kInfinity;
      }
    }
  }

 private:
  // The visible keys of one segment, rounded down to the beginning of a tile.
  struct TileRange {
    int begin = 0, end = 0;
    int count = 0;  // tiles

    TileRange() = default;
    __device__ __forceinline__ explicit TileRange(const Range& visible)
        : begin(visible.begin / kBlockN * kBlockN), end(visible.end) {
      if (visible.end > visible.begin) count = (end - begin + kBlockN - 1) / kBlockN;
    }
  };

  const AttentionProblem& problem_;
  const Sequence& sequence_;
  const RowTile& rows_;
  TileRange prompt_, own_;
  int first_query_, last_query_;  // positions
};

// The grid of the forward and of dQ: (B * row tiles, Hkv). The row tiles of a sequence are neighbours on the x axis.
inline dim3 row_tile_grid(const AttentionProblem& problem) {
  const int tiles = (problem.queries * problem.group + kBlockRows - 1) / kBlockRows;
  return dim3(static_cast<unsigned>(tiles) * problem.batch, problem.kv_heads);
}

// The rows of this block in that grid.
__device__ __forceinline__ RowTile row_tile_of_block(const AttentionProblem& problem) {
  const int rows = problem.queries * problem.group, tiles = (rows + kBlockRows - 1) / kBlockRows;
  const int index = blockIdx.x, first = index % tiles * kBlockRows;
  return {index / tiles, static_cast<int>(blockIdx.y), first, min(first + kBlockRows, rows), problem.group};
}

// Calls body(T(), integral_constant<int, D>()) with the problem's dtype and head size.
template <class Body>
void for_dtype_and_head_size(const AttentionProblem& problem, const Body& body) {
  const auto with_head_size = [&](auto dtype) {
    switch (problem.head_size) {
      case 64: return body(dtype, std::integral_constant<int, 64>());
      case 96: return body(dtype, std::integral_constant<int, 96>());
      case 128: return body(dtype, std::integral_constant<int, 128>());
    }
    throw std::invalid_argument("no kernel for the head size " + std::to_string(problem.head_size));
  };
  problem.dtype == Dtype::bfloat16 ? with_head_size(__nv_bfloat16()) : with_head_size(__half());
}

}  // namespace softprompt
