// The GEMMs of attention on fp32 vectors, for any number of rows. All operands are packed in fp32.
//
// AmxForward and AmxBackward in tile_gemm_amx.h have the same functions.
#pragma once

#include "cpu/attention/blocks.h"
#include "cpu/attention/rows.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

class SimdForward {
 public:
  static constexpr int kBlockRows = kRegisterRows;  // the rows whose scores exist at a time
  static EvenBlocks blocks(int64_t rows) { return {rows, kBlockRows}; }

  SimdForward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    rows_ = arena.take<float>(kTileKeys * size_);
    keys_ = arena.take<float>(size_ * kTileKeys);
    values_ = arena.take<float>(kTileKeys * value_size_);
  }

  // Takes Q of a unit, [rows, D rounded up to lanes].
  void begin_unit(const float* query, int64_t) { query_ = query; }

  void begin_tile(const KeySegment& segment, int64_t tile, int width) {
    pack_tile_columns(segment, &KeySource::key, problem_.dtype, tile, width, problem_.size, rows_, keys_);
    pack_tile(segment, &KeySource::value, problem_.dtype, tile, width, problem_.value_size, values_);
  }

  // scores [rows, kTileKeys] = Q Kᵀ, in the visible columns.
  void score(int64_t row, int rows, const VisibleSpan& span, float* scores) const {
    gemm_rows<Layout::row_major>(rows, span.vectors * kLanes, problem_.size, query_ + row * size_, size_,
                                 keys_ + span.first, kTileKeys, scores + span.first, kTileKeys, false);
  }

  // Zeroes weights that some rows of a block do not see but add_values reads. Here add_values reads visible ones only.
  void clear_hidden_weights(const VisibleSpan&, const VisibleSpan&, int, float*) const {}

  // output [rows, Dv rounded up to lanes] += P V.
  void add_values(int rows, const VisibleSpan& span, const float* weights, float* output) const {
    gemm_rows<Layout::row_major>(rows, value_size_, span.end - span.first, weights + span.first, kTileKeys,
                                 values_ + span.first * value_size_, value_size_, output, value_size_, true);
  }

 private:
  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float *rows_, *keys_, *values_;  // [kTileKeys, D], [D, kTileKeys], [kTileKeys, Dv]
  const float* query_ = nullptr;
};

class SimdBackward {
 public:
  static constexpr int kColumnMultiple = kLanes;
  static constexpr int64_t kBlockRowTiles = kBlockRows / kRegisterRows;
  static_assert(kBlockRowTiles <= kMaxRowTiles);
  static EvenBlocks row_tiles(int64_t rows) { return {rows, kRegisterRows}; }

  SimdBackward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    key_rows_ = arena.take<float>(kTileKeys * size_);
    keys_ = arena.take<float>(size_ * kTileKeys);
    value_rows_ = arena.take<float>(kTileKeys * value_size_);
    values_ = arena.take<float>(value_size_ * kTileKeys);
  }

  // Takes Q and dO of a unit.
  void begin_unit(const float* query, const float* grad_out, int64_t) { query_ = query, grad_out_ = grad_out; }

  void begin_tile(const KeySegment& segment, int64_t tile, int width) {
    pack_tile(segment, &KeySource::key, problem_.dtype, tile, width, problem_.size, key_rows_);
    transpose_rows(key_rows_, size_, width, problem_.size, keys_);
    pack_tile_columns(segment, &KeySource::value, problem_.dtype, tile, width, problem_.value_size, value_rows_,
                      values_);
  }

  // scores = Q Kᵀ and grad = dO Vᵀ, both [rows of the block, kTileKeys], in the visible columns.
  void score(const RowBlock& block, float* scores, float* grad) const {
    for (int t = 0; t < block.count; ++t) {
      const VisibleSpan& span = block.span[t];
      const int64_t row = block.row[t], offset = (row - block.row[0]) * kTileKeys + span.first;
      const int rows = static_cast<int>(block.row[t + 1] - row);
      if (span.vectors == 0) continue;
      gemm_rows<Layout::row_major>(rows, span.vectors * kLanes, problem_.size, query_ + row * size_, size_,
                                   keys_ + span.first, kTileKeys, scores + offset, kTileKeys, false);
      gemm_rows<Layout::row_major>(rows, span.vectors * kLanes, problem_.value_size, grad_out_ + row * value_size_,
                                   value_size_, values_ + span.first, kTileKeys, grad + offset, kTileKeys, false);
    }
  }

  // Zeroes the rows of P and dS that pad a block. Vectors need no padding.
  void pad_weights(const RowBlock&, float*, float*) const {}

  // dQ of a unit += dS K.
  void add_dq(const RowBlock& block, const float* grad_scores, float* grad_query) const {
    for (int t = 0; t < block.count; ++t) {
      const VisibleSpan& span = block.span[t];
      if (span.vectors == 0) continue;
      const int64_t row = block.row[t];
      gemm_rows<Layout::row_major>(static_cast<int>(block.row[t + 1] - row), size_, span.end - span.first,
                                   grad_scores + (row - block.row[0]) * kTileKeys + span.first, kTileKeys,
                                   key_rows_ + span.first * size_, size_, grad_query + row * size_, size_, true);
    }
  }

  // dV += Pᵀ dO and dK += dSᵀ Q. Row tiles at both ends of the block that do not see the keys are left out.
  void add_dkdv(const TileAccumulators& targets, const RowBlock& block, const float* weights,
                const float* grad_scores) const {
    targets.for_each([&](int begin, int end, int64_t first_key, const DkDvAccumulator& accumulator) {
      const EvenBlocks column_blocks(end - begin, kRegisterRows);
      for (int64_t c = 0; c < column_blocks.blocks; ++c) {
        const int first_column = begin + static_cast<int>(column_blocks.start(c));
        const int end_column = begin + static_cast<int>(column_blocks.start(c + 1));
        int first_row_tile = 0, end_row_tile = block.count;
        const auto hidden = [&](const VisibleSpan& span) {
          return span.vectors == 0 || span.end <= first_column || span.first >= end_column;
        };
        while (first_row_tile < end_row_tile && hidden(block.span[first_row_tile])) ++first_row_tile;
        while (first_row_tile < end_row_tile && hidden(block.span[end_row_tile - 1])) --end_row_tile;
        if (first_row_tile == end_row_tile) continue;
        const int64_t row = block.row[first_row_tile], rows = block.row[end_row_tile] - row,
                      target_row = first_key + first_column - begin;
        const int64_t offset = (row - block.row[0]) * kTileKeys + first_column;
        if (accumulator.dv != nullptr) {
          gemm_rows<Layout::column_major>(end_column - first_column, value_size_, rows, weights + offset, kTileKeys,
                                          grad_out_ + row * value_size_, value_size_,
                                          accumulator.dv + target_row * value_size_, value_size_, true);
        }
        if (accumulator.dk != nullptr) {
          gemm_rows<Layout::column_major>(end_column - first_column, size_, rows, grad_scores + offset, kTileKeys,
                                          query_ + row * size_, size_, accumulator.dk + target_row * size_, size_,
                                          true);
        }
      }
    });
  }

  void end_tile(const TileAccumulators&) const {}

 private:
  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float *key_rows_, *keys_;      // [kTileKeys, D], [D, kTileKeys]
  float *value_rows_, *values_;  // [kTileKeys, Dv], [Dv, kTileKeys]
  const float *query_ = nullptr, *grad_out_ = nullptr;
};

}  // namespace softprompt::SPK_ISA
