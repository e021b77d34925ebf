// The GEMMs of attention on the matrix unit, to the accuracy of fp32 or of the tensors (see amx.h).
//
// Rows and keys are packed as tiles, in as many bf16 parts as the dtype needs: 3 for fp32, 1 for bf16, 2 for fp16. A
// 16-bit Q is not packed times the scale, because the scaled Q would need more parts. The weights P and the gradients
// dS are computed in fp32. They are multiplied in 3 parts with fp32 tensors, and in 2 parts, 16 bits, with 16-bit ones.
#pragma once

#include "cpu/attention/blocks.h"
#include "cpu/attention/rows.h"
#include "cpu/gemm/amx.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

constexpr int kKeyTiles = kTileKeys / kAmxTile;   // AMX tiles of a tile of keys
constexpr int kKeySteps = kTileKeys / kAmxDepth;  // depth steps over a tile of keys

SPK_INLINE int64_t tile_count(int64_t size) { return ceil_div(size, kAmxTile); }
SPK_INLINE int64_t step_count(int64_t size) { return ceil_div(size, kAmxDepth); }

// Packs keys or values as the B of a GEMM whose depth is their size, D or Dv: [steps][parts][kKeyTiles] AMX tiles. They
// are read from `width` fp32 rows of [kTileKeys, size rounded up to lanes].
template <int parts>
static void pack_keys_over_size(const float* rows, int64_t size, int width, char* packed) {
  const int64_t stride = round_up(size, kLanes);
  for (int64_t s = 0; s < step_count(size); ++s) {
    for (int64_t tile = 0; tile < tile_count(width); ++tile) {
      pack_depth_inner<parts, true>(rows + tile * kAmxTile * stride + s * kAmxDepth, stride, kAmxTile,
                                    static_cast<int>(stride - s * kAmxDepth),
                                    packed + (s * parts * kKeyTiles + tile) * kAmxTileBytes, kKeyTiles * kAmxTileBytes);
    }
  }
}

// Packs the same as the B of a GEMM whose depth is the keys: [kKeySteps][parts][tiles of size] AMX tiles.
template <int parts>
static void pack_keys_over_keys(const float* rows, int64_t size, int width, char* packed) {
  const int64_t stride = round_up(size, kLanes), tiles = tile_count(size);
  for (int64_t s = 0; s < step_count(width); ++s) {
    const int depth = static_cast<int>(round_up(width, kLanes) - s * kAmxDepth);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      pack_depth_outer<parts, false>(rows + s * kAmxDepth * stride + tile * kAmxTile, stride, kAmxTile, depth,
                                     packed + (s * parts * tiles + tile) * kAmxTileBytes, tiles * kAmxTileBytes);
    }
  }
}

// Packs the rows of a unit as the A of a GEMM whose depth is their size: [steps][parts][max_rows] rows of AMX tiles. A
// tile can begin at any row.
template <int parts>
static void pack_rows_over_size(const float* rows, int64_t size, int64_t count, int64_t max_rows, char* packed) {
  const int64_t stride = round_up(size, kLanes);
  for (int64_t s = 0; s < step_count(size); ++s) {
    for (int64_t row = 0; row < count; row += kAmxTile) {
      pack_depth_inner<parts, false>(rows + row * stride + s * kAmxDepth, stride,
                                     static_cast<int>(min64(kAmxTile, count - row)),
                                     static_cast<int>(stride - s * kAmxDepth),
                                     packed + (s * parts * max_rows + row) * kAmxRowBytes, max_rows * kAmxRowBytes);
    }
  }
}

// The packed rows of a unit from `row` on.
template <int parts>
SPK_INLINE PackedTiles packed_rows(const char* packed, int64_t row, int64_t max_rows) {
  const int64_t plane = max_rows * kAmxRowBytes;
  return {packed + row * kAmxRowBytes, parts * plane, plane, kAmxTileBytes};
}

// Packs weights [rows, kTileKeys] as the A of a GEMM whose depth is the keys: [kKeySteps][parts][row tiles] AMX tiles.
template <int parts>
static void pack_weights(const float* weights, int row_tiles, int first_step, int end_step, char* packed) {
  for (int s = first_step; s < end_step; ++s) {
    for (int tile = 0; tile < row_tiles; ++tile) {
      pack_depth_inner<parts, false>(weights + tile * kAmxTile * kTileKeys + s * kAmxDepth, kTileKeys, kAmxTile,
                                     kAmxDepth, packed + (s * parts * row_tiles + tile) * kAmxTileBytes,
                                     row_tiles * kAmxTileBytes);
    }
  }
}

template <int parts, int weight_parts>
class AmxForward {
 public:
  static constexpr int kBlockRows = 2 * kAmxTile;
  static constexpr int64_t kMaxPackedRows = kUnitRows + kBlockRows;  // a block may end behind the last row
  static FixedBlocks blocks(int64_t rows) { return {rows, kBlockRows}; }

  AmxForward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    rows_ = arena.take<float>(kTileKeys * max64(size_, value_size_));
    partial_output_ = arena.take<float>(kBlockRows * value_size_);
    query_ = arena.take<char>(step_count(size_) * parts * kMaxPackedRows * kAmxRowBytes);
    keys_ = arena.take<char>(step_count(size_) * parts * kKeyTiles * kAmxTileBytes);
    values_ = arena.take<char>(kKeySteps * parts * tile_count(value_size_) * kAmxTileBytes);
    weights_ = arena.take<char>(kKeySteps * weight_parts * 2 * kAmxTileBytes);
  }

  void begin_unit(const float* query, int64_t rows) {
    pack_rows_over_size<parts>(query, size_, rows, kMaxPackedRows, query_);
  }

  void begin_tile(const KeySegment& segment, int64_t tile, int width) {
    pack_tile(segment, &KeySource::key, problem_.dtype, tile, width, problem_.size, rows_);
    pack_keys_over_size<parts>(rows_, size_, width, keys_);
    pack_tile(segment, &KeySource::value, problem_.dtype, tile, width, problem_.value_size, rows_);
    pack_keys_over_keys<parts>(rows_, value_size_, width, values_);
  }

  void score(int64_t row, int rows, const VisibleSpan& span, float* scores) const {
    const PackedTiles keys{keys_, parts * kKeyTiles * kAmxTileBytes, kKeyTiles * kAmxTileBytes, kAmxTileBytes};
    multiply_packed<parts, parts>(static_cast<int>(tile_count(rows)), span.vectors, step_count(size_),
                                  packed_rows<parts>(query_, row, kMaxPackedRows),
                                  keys.at(span.first / kAmxTile * keys.next), scores + span.first, kTileKeys, false);
  }

  // Zeroes the weights outside `part_span`, which is what some rows see of the `span` of their block.
  void clear_hidden_weights(const VisibleSpan& span, const VisibleSpan& part_span, int rows, float* weights) const {
    const int first = span.first / kAmxDepth * kAmxDepth, end = static_cast<int>(round_up(span.end, kAmxDepth));
    const bool any_visible = part_span.vectors > 0;
    if (any_visible && part_span.first == first && part_span.vectors * kLanes == end - first) return;
    for (int i = 0; i < rows; ++i) {
      clear_columns(weights + i * kTileKeys, first, any_visible ? part_span.first : end);
      if (any_visible) clear_columns(weights + i * kTileKeys, part_span.first + part_span.vectors * kLanes, end);
    }
  }

  // Weights that a row does not see are 0. Weights of rows behind the last row are arbitrary.
  void add_values(int rows, const VisibleSpan& span, const float* weights, float* output) const {
    const int row_tiles = static_cast<int>(tile_count(rows)), first = span.first / kAmxDepth;
    const int end = static_cast<int>(ceil_div(span.end, kAmxDepth));
    pack_weights<weight_parts>(weights, row_tiles, first, end, weights_);
    const PackedTiles a{weights_, weight_parts * row_tiles * kAmxTileBytes, row_tiles * kAmxTileBytes, kAmxTileBytes};
    const PackedTiles b{values_, parts * tile_count(value_size_) * kAmxTileBytes,
                        tile_count(value_size_) * kAmxTileBytes, kAmxTileBytes};
    // If not all tiles are full, adding in place would change the rows behind the last one, at least from -0 to 0.
    const bool full_tiles = rows % kAmxTile == 0;
    multiply_packed<weight_parts, parts>(row_tiles, static_cast<int>(tile_count(value_size_)), end - first,
                                         a.at(first * a.step), b.at(first * b.step),
                                         full_tiles ? output : partial_output_, value_size_, full_tiles);
    for (int64_t i = 0; i < rows * value_size_ && !full_tiles; i += kLanes) {
      store(output + i, load(output + i) + load(partial_output_ + i));
    }
  }

 private:
  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float *rows_, *partial_output_;             // [kTileKeys, D or Dv], [kBlockRows, Dv]
  char *query_, *keys_, *values_, *weights_;  // AMX tiles
};

// dK and dV are accumulated over the rows of a unit as their transposes, dVᵀ += dOᵀ P and dKᵀ += Qᵀ dS. So P and dS are
// packed without a transpose, and Q and dO, which need one, are packed once for all keys. The slices of a unit begin at
// rows that are multiples of kAmxDepth, so that no step of the depth has rows of two slices.
template <int parts, int weight_parts>
class AmxBackward {
 public:
  static constexpr int kColumnMultiple = kAmxDepth;
  static constexpr int64_t kRowTileRows = 8;
  static constexpr int64_t kBlockRowTiles = kBlockRows / kRowTileRows;
  static_assert(kBlockRowTiles <= kMaxRowTiles && kBlockRows % kAmxDepth == 0);
  static FixedBlocks row_tiles(int64_t rows) { return {rows, kRowTileRows}; }

  AmxBackward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    const int64_t tiles = tile_count(size_), value_tiles = tile_count(value_size_);
    rows_ = arena.take<float>(kTileKeys * max64(size_, value_size_));
    query_ = arena.take<char>(step_count(size_) * parts * kUnitRows * kAmxRowBytes);
    grad_out_ = arena.take<char>(step_count(value_size_) * parts * kUnitRows * kAmxRowBytes);
    query_for_dk_ = arena.take<char>(kUnitRows / kAmxDepth * parts * tiles * kAmxTileBytes);
    grad_out_for_dv_ = arena.take<char>(kUnitRows / kAmxDepth * parts * value_tiles * kAmxTileBytes);
    keys_ = arena.take<char>(step_count(size_) * parts * kKeyTiles * kAmxTileBytes);
    values_ = arena.take<char>(step_count(value_size_) * parts * kKeyTiles * kAmxTileBytes);
    keys_for_dq_ = arena.take<char>(kKeySteps * parts * tiles * kAmxTileBytes);
    grad_scores_for_dq_ = arena.take<char>(kKeySteps * weight_parts * (kBlockRows / kAmxTile) * kAmxTileBytes);
    weights_for_dkdv_ = arena.take<char>(kBlockRows / kAmxDepth * weight_parts * kKeyTiles * kAmxTileBytes);
    dk_transposed_ = arena.take<float>(size_ * kTileKeys);
    dv_transposed_ = arena.take<float>(value_size_ * kTileKeys);
  }

  void begin_unit(const float* query, const float* grad_out, int64_t rows) {
    pack_rows_over_size<parts>(query, size_, rows, kUnitRows, query_);
    pack_rows_over_size<parts>(grad_out, value_size_, rows, kUnitRows, grad_out_);
    pack_rows_over_rows(query, size_, rows, query_for_dk_);
    pack_rows_over_rows(grad_out, value_size_, rows, grad_out_for_dv_);
  }

  void begin_tile(const KeySegment& segment, int64_t tile, int width) {
    pack_tile(segment, &KeySource::key, problem_.dtype, tile, width, problem_.size, rows_);
    pack_keys_over_size<parts>(rows_, size_, width, keys_);
    pack_keys_over_keys<parts>(rows_, size_, width, keys_for_dq_);
    pack_tile(segment, &KeySource::value, problem_.dtype, tile, width, problem_.value_size, rows_);
    pack_keys_over_size<parts>(rows_, value_size_, width, values_);
    for (int64_t i = 0; i < size_ * kTileKeys; i += kLanes) store(dk_transposed_ + i, Vec{});
    for (int64_t i = 0; i < value_size_ * kTileKeys; i += kLanes) store(dv_transposed_ + i, Vec{});
  }

  void score(const RowBlock& block, float* scores, float* grad) const {
    const int row_tiles = static_cast<int>(tile_count(block.rows())),
              column_tiles = (block.end - block.begin) / kAmxTile;
    const auto key_tiles = [&](const char* packed) __attribute__((always_inline)) {
      return PackedTiles{packed + block.begin / kAmxTile * kAmxTileBytes, parts * kKeyTiles * kAmxTileBytes,
                         kKeyTiles * kAmxTileBytes, kAmxTileBytes};
    };
    multiply_packed<parts, parts>(row_tiles, column_tiles, step_count(size_),
                                  packed_rows<parts>(query_, block.row[0], kUnitRows), key_tiles(keys_),
                                  scores + block.begin, kTileKeys, false);
    multiply_packed<parts, parts>(row_tiles, column_tiles, step_count(value_size_),
                                  packed_rows<parts>(grad_out_, block.row[0], kUnitRows), key_tiles(values_),
                                  grad + block.begin, kTileKeys, false);
  }

  // Zeroes the rows that pad a block to a whole step of the depth.
  void pad_weights(const RowBlock& block, float* weights, float* grad_scores) const {
    for (int64_t i = block.rows(); i < round_up(block.rows(), kAmxDepth); ++i) {
      clear_columns(weights + i * kTileKeys, block.begin, block.end);
      clear_columns(grad_scores + i * kTileKeys, block.begin, block.end);
    }
  }

  void add_dq(const RowBlock& block, const float* grad_scores, float* grad_query) const {
    const int row_tiles = static_cast<int>(tile_count(block.rows())), tiles = static_cast<int>(tile_count(size_));
    const int first = block.begin / kAmxDepth, end = block.end / kAmxDepth;
    pack_weights<weight_parts>(grad_scores, row_tiles, first, end, grad_scores_for_dq_);
    const PackedTiles a{grad_scores_for_dq_, weight_parts * row_tiles * kAmxTileBytes, row_tiles * kAmxTileBytes,
                        kAmxTileBytes};
    const PackedTiles b{keys_for_dq_, parts * tiles * kAmxTileBytes, tiles * kAmxTileBytes, kAmxTileBytes};
    multiply_packed<weight_parts, parts>(row_tiles, tiles, end - first, a.at(first * a.step), b.at(first * b.step),
                                         grad_query + block.row[0] * size_, size_, true);
  }

  void add_dkdv(const TileAccumulators& keys, const RowBlock& block, const float* weights,
                const float* grad_scores) const {
    bool needs_dk = false, needs_dv = false;
    keys.for_each([&](int, int, int64_t, const DkDvAccumulator& accumulator) {
      needs_dk |= accumulator.dk != nullptr;
      needs_dv |= accumulator.dv != nullptr;
    });
    if (needs_dv) add_gradient(block, weights, grad_out_for_dv_, value_size_, dv_transposed_);
    if (needs_dk) add_gradient(block, grad_scores, query_for_dk_, size_, dk_transposed_);
  }

  void end_tile(const TileAccumulators& keys) const {
    keys.for_each([&](int begin, int end, int64_t first_key, const DkDvAccumulator& accumulator) {
      if (accumulator.dk != nullptr) {
        add_transpose(dk_transposed_, size_, begin, end, accumulator.dk + first_key * size_);
      }
      if (accumulator.dv != nullptr) {
        add_transpose(dv_transposed_, value_size_, begin, end, accumulator.dv + first_key * value_size_);
      }
    });
  }

 private:
  // Packs the rows of a unit as the A of a GEMM whose depth is the rows: [steps][parts][tiles of size] AMX tiles.
  void pack_rows_over_rows(const float* rows, int64_t size, int64_t count, char* packed) const {
    const int64_t tiles = tile_count(size);
    for (int64_t row = 0; row < count; row += kAmxDepth) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        pack_depth_outer<parts, true>(
            rows + row * size + tile * kAmxTile, size, kAmxTile, static_cast<int>(min64(kAmxDepth, count - row)),
            packed + (row / kAmxDepth * parts * tiles + tile) * kAmxTileBytes, tiles * kAmxTileBytes);
      }
    }
  }

  // accumulator [size, kTileKeys] += rowsᵀ weights, over the rows of a block.
  void add_gradient(const RowBlock& block, const float* weights, const char* rows, int64_t size,
                    float* accumulator) const {
    const int64_t tiles = tile_count(size), steps = ceil_div(block.rows(), kAmxDepth);
    const int column_tiles = (block.end - block.begin) / kAmxTile;
    for (int64_t s = 0; s < steps; ++s) {
      for (int tile = 0; tile < column_tiles; ++tile) {
        pack_depth_outer<weight_parts, false>(
            weights + s * kAmxDepth * kTileKeys + block.begin + tile * kAmxTile, kTileKeys, kAmxTile, kAmxDepth,
            weights_for_dkdv_ + (s * weight_parts * column_tiles + tile) * kAmxTileBytes, column_tiles * kAmxTileBytes);
      }
    }
    const PackedTiles a{rows + block.row[0] / kAmxDepth * parts * tiles * kAmxTileBytes, parts * tiles * kAmxTileBytes,
                        tiles * kAmxTileBytes, kAmxTileBytes};
    const PackedTiles b{weights_for_dkdv_, weight_parts * column_tiles * kAmxTileBytes, column_tiles * kAmxTileBytes,
                        kAmxTileBytes};
    multiply_packed<parts, weight_parts>(static_cast<int>(tiles), column_tiles, steps, a, b, accumulator + block.begin,
                                         kTileKeys, true);
  }

  // target [end - begin, size] += the transpose of the columns [begin, end) of accumulator [size, kTileKeys].
  static void add_transpose(const float* accumulator, int64_t size, int begin, int end, float* target) {
    for (int column = begin / kAmxTile * kAmxTile; column < end; column += kAmxTile) {
      for (int64_t d = 0; d < size; d += kAmxTile) {
        Vec block[kAmxTile];
        SPK_UNROLL for (int i = 0; i < kAmxTile; ++i) block[i] = load(accumulator + (d + i) * kTileKeys + column);
        transpose(block);
        for (int i = 0; i < kAmxTile; ++i) {
          if (column + i < begin || column + i >= end) continue;
          float* const at = target + (column + i - begin) * size + d;
          store(at, load(at) + block[i]);
        }
      }
    }
  }

  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float* rows_;                            // [kTileKeys, D or Dv]
  char *query_, *grad_out_;                // AMX tiles; the depth of their GEMMs is D or Dv
  char *query_for_dk_, *grad_out_for_dv_;  // the depth is the rows
  char *keys_, *values_;                   // the depth is D or Dv
  char* keys_for_dq_;                      // the depth is the keys
  char* grad_scores_for_dq_;               // dS; the depth is the keys
  char* weights_for_dkdv_;                 // P or dS; the depth is the rows
  float *dk_transposed_, *dv_transposed_;  // [D, kTileKeys], [Dv, kTileKeys]
};

}  // namespace softprompt::SPK_ISA
