// The products of attention on fp32 vectors: any number of rows, everything packed in fp32.
//
// `TileProducts` in tile_gemm_amx.h has the same functions.
#pragma once

#include "cpu/attention/blocks.h"
#include "cpu/attention/rows.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

class VectorForward {
 public:
  static constexpr int kBlockRows = kTileRows;  // whose scores exist at a time
  static Blocks blocks(int64_t rows) { return {rows, kBlockRows}; }

  VectorForward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    rows_ = arena.take<float>(kTileKeys * size_);
    keys_ = arena.take<float>(size_ * kTileKeys);
    values_ = arena.take<float>(kTileKeys * value_size_);
  }

  // Q of a unit, [rows, D up to lanes].
  void take_rows(const float* query, int64_t) { query_ = query; }

  void take_keys(const Segment& segment, int64_t tile, int width) {
    pack_tile_columns(segment, &Source::key, problem_.dtype, tile, width, problem_.size, rows_, keys_);
    pack_tile(segment, &Source::value, problem_.dtype, tile, width, problem_.value_size, values_);
  }

  // scores [rows, kTileKeys] = Q Kᵀ, where they are seen.
  void score(int64_t row, int rows, const Seen& seen, float* scores) const {
    gemm_rows<Layout::rows>(rows, seen.vectors * kLanes, problem_.size, query_ + row * size_, size_, keys_ + seen.first,
                            kTileKeys, scores + seen.first, kTileKeys, false);
  }

  // What of a block's weights must be 0: the vectors read no other than `seen`, which for them is the same.
  void clear_unseen(const Seen&, const Seen&, int, float*) const {}

  // output [rows, Dv up to lanes] += P V.
  void add_values(int rows, const Seen& seen, const float* weights, float* output) const {
    gemm_rows<Layout::rows>(rows, value_size_, seen.end - seen.first, weights + seen.first, kTileKeys,
                            values_ + seen.first * value_size_, value_size_, output, value_size_, true);
  }

 private:
  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float *rows_, *keys_, *values_;  // [kTileKeys, D], [D, kTileKeys], [kTileKeys, Dv]
  const float* query_ = nullptr;
};

class VectorBackward {
 public:
  static constexpr int kColumns = kLanes;
  static constexpr int64_t kBlockTiles = kBlockRows / kTileRows;
  static_assert(kBlockTiles <= kMostRowTiles);
  static Blocks row_tiles(int64_t rows) { return {rows, kTileRows}; }

  VectorBackward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    key_rows_ = arena.take<float>(kTileKeys * size_);
    keys_ = arena.take<float>(size_ * kTileKeys);
    value_rows_ = arena.take<float>(kTileKeys * value_size_);
    values_ = arena.take<float>(value_size_ * kTileKeys);
  }

  // Q and dO of a unit.
  void take_rows(const float* query, const float* grad_out, int64_t) { query_ = query, grad_out_ = grad_out; }

  void take_keys(const Segment& segment, int64_t tile, int width) {
    pack_tile(segment, &Source::key, problem_.dtype, tile, width, problem_.size, key_rows_);
    transpose_rows(key_rows_, size_, width, problem_.size, keys_);
    pack_tile_columns(segment, &Source::value, problem_.dtype, tile, width, problem_.value_size, value_rows_, values_);
  }

  // scores = Q Kᵀ and grad = dO Vᵀ, [rows of the block, kTileKeys], where they are seen.
  void score(const Block& block, float* scores, float* grad) const {
    for (int t = 0; t < block.count; ++t) {
      const Seen& seen = block.seen[t];
      const int64_t row = block.row[t], offset = (row - block.row[0]) * kTileKeys + seen.first;
      const int rows = static_cast<int>(block.row[t + 1] - row);
      if (seen.vectors == 0) continue;
      gemm_rows<Layout::rows>(rows, seen.vectors * kLanes, problem_.size, query_ + row * size_, size_, keys_ + seen.first,
                              kTileKeys, scores + offset, kTileKeys, false);
      gemm_rows<Layout::rows>(rows, seen.vectors * kLanes, problem_.value_size, grad_out_ + row * value_size_,
                              value_size_, values_ + seen.first, kTileKeys, grad + offset, kTileKeys, false);
    }
  }

  // P and dS of a block, 0 where it does not look: the vectors read them where they are.
  void take_weights(const Block&, float*, float*) const {}

  // dQ of a unit += dS K.
  void add_grad_query(const Block& block, const float* grad_scores, float* grad_query) const {
    for (int t = 0; t < block.count; ++t) {
      const Seen& seen = block.seen[t];
      if (seen.vectors == 0) continue;
      const int64_t row = block.row[t];
      gemm_rows<Layout::rows>(static_cast<int>(block.row[t + 1] - row), size_, seen.end - seen.first,
                              grad_scores + (row - block.row[0]) * kTileKeys + seen.first, kTileKeys,
                              key_rows_ + seen.first * size_, size_, grad_query + row * size_, size_, true);
    }
  }

  // dV += Pᵀ dO and dK += dSᵀ Q. Rows that do not see some keys are left out at both ends.
  void add_grad_keys(const KeysOfTile& keys, const Block& block, const float* weights, const float* grad_scores) const {
    keys.for_each([&](int begin, int end, int64_t first_key, const KeySum& sum) {
      const Blocks columns(end - begin, kTileRows);
      for (int64_t c = 0; c < columns.blocks; ++c) {
        const int first = begin + static_cast<int>(columns.start(c));
        const int last = begin + static_cast<int>(columns.start(c + 1));
        int low = 0, high = block.count;
        const auto unseen = [&](const Seen& seen) {
          return seen.vectors == 0 || seen.end <= first || seen.first >= last;
        };
        while (low < high && unseen(block.seen[low])) ++low;
        while (low < high && unseen(block.seen[high - 1])) --high;
        if (low == high) continue;
        const int64_t row = block.row[low], rows = block.row[high] - row, key = first_key + first - begin;
        const int64_t offset = (row - block.row[0]) * kTileKeys + first;
        if (sum.value != nullptr) {
          gemm_rows<Layout::columns>(last - first, value_size_, rows, weights + offset, kTileKeys,
                                     grad_out_ + row * value_size_, value_size_, sum.value + key * value_size_,
                                     value_size_, true);
        }
        if (sum.key != nullptr) {
          gemm_rows<Layout::columns>(last - first, size_, rows, grad_scores + offset, kTileKeys, query_ + row * size_,
                                     size_, sum.key + key * size_, size_, true);
        }
      }
    });
  }

  void finish_keys(const KeysOfTile&) const {}

 private:
  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float *key_rows_, *keys_;      // [kTileKeys, D], [D, kTileKeys]
  float *value_rows_, *values_;  // [kTileKeys, Dv], [Dv, kTileKeys]
  const float *query_ = nullptr, *grad_out_ = nullptr;
};

}  // namespace softprompt::SPK_ISA
