// The products of attention on the matrix unit, to the accuracy of fp32 or of the tensors (see amx.h).
//
// Rows and keys are packed as images of tiles, in as many parts as the dtype needs: 3 for fp32, 1 for bf16, 2 for fp16. So
// that Q is as exact as its dtype it is not packed times the scale where that has 16 bits. Weights P and their gradients
// are computed in fp32 and multiplied in 3 parts with fp32, and in 2, that is 16 bits, with what has 16 itself.
#pragma once

#include "cpu/gemm/amx.h"
#include "cpu/attention/blocks.h"
#include "cpu/attention/rows.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

constexpr int kKeyTiles = kTileKeys / kTile;        // of a tile of keys
constexpr int kKeySteps = kTileKeys / kTileDepth;

SPK_INLINE int64_t tiles_of(int64_t size) { return ceiling(size, kTile); }
SPK_INLINE int64_t steps_of(int64_t size) { return ceiling(size, kTileDepth); }

// Keys or values as the right side of a product over their size, D: [steps][parts][kKeyTiles] images. They are read from
// fp32 rows [kTileKeys, size up to lanes], of which `width` are there.
template <int parts>
static void pack_keys_along(const float* rows, int64_t size, int width, char* images) {
  const int64_t stride = round_up(size, kLanes);
  for (int64_t s = 0; s < steps_of(size); ++s) {
    for (int64_t tile = 0; tile < tiles_of(width); ++tile) {
      pack_along<parts, true>(rows + tile * kTile * stride + s * kTileDepth, stride, kTile,
                              static_cast<int>(stride - s * kTileDepth),
                              images + (s * parts * kKeyTiles + tile) * kImage, kKeyTiles * kImage);
    }
  }
}

// The same as the right side of a product over keys: [kKeySteps][parts][tiles of size] images.
template <int parts>
static void pack_keys_down(const float* rows, int64_t size, int width, char* images) {
  const int64_t stride = round_up(size, kLanes), tiles = tiles_of(size);
  for (int64_t s = 0; s < steps_of(width); ++s) {
    const int deep = static_cast<int>(round_up(width, kLanes) - s * kTileDepth);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      pack_down<parts, false>(rows + s * kTileDepth * stride + tile * kTile, stride, kTile, deep,
                              images + (s * parts * tiles + tile) * kImage, tiles * kImage);
    }
  }
}

// Rows of a unit as the left side of a product over their size: [steps][parts][most rows] rows of images, so that a tile
// can begin at any row.
template <int parts>
static void pack_unit_rows(const float* rows, int64_t size, int64_t count, int64_t most_rows, char* images) {
  const int64_t stride = round_up(size, kLanes);
  for (int64_t s = 0; s < steps_of(size); ++s) {
    for (int64_t row = 0; row < count; row += kTile) {
      pack_along<parts, false>(rows + row * stride + s * kTileDepth, stride, static_cast<int>(least(kTile, count - row)),
                               static_cast<int>(stride - s * kTileDepth),
                               images + (s * parts * most_rows + row) * kImageRow, most_rows * kImageRow);
    }
  }
}

template <int parts>
SPK_INLINE Images unit_rows(const char* images, int64_t row, int64_t most_rows) {
  const int64_t plane = most_rows * kImageRow;
  return {images + row * kImageRow, parts * plane, plane, kImage};
}

// Weights [rows, kTileKeys] as the left side of a product over keys: [kKeySteps][parts][row tiles] images.
template <int parts>
static void pack_weights(const float* weights, int row_tiles, int first_step, int end_step, char* images) {
  for (int s = first_step; s < end_step; ++s) {
    for (int tile = 0; tile < row_tiles; ++tile) {
      pack_along<parts, false>(weights + tile * kTile * kTileKeys + s * kTileDepth, kTileKeys, kTile, kTileDepth,
                               images + (s * parts * row_tiles + tile) * kImage, row_tiles * kImage);
    }
  }
}

template <int parts, int weight_parts>
class TileForward {
 public:
  static constexpr int kBlockRows = 2 * kTile;
  static constexpr int64_t kMostRows = kUnitRows + kBlockRows;  // a block may end behind the last row
  static FixedBlocks blocks(int64_t rows) { return {rows, kBlockRows}; }

  TileForward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    rows_ = arena.take<float>(kTileKeys * most(size_, value_size_));
    part_ = arena.take<float>(kBlockRows * value_size_);
    query_ = arena.take<char>(steps_of(size_) * parts * kMostRows * kImageRow);
    keys_ = arena.take<char>(steps_of(size_) * parts * kKeyTiles * kImage);
    values_ = arena.take<char>(kKeySteps * parts * tiles_of(value_size_) * kImage);
    weights_ = arena.take<char>(kKeySteps * weight_parts * 2 * kImage);
  }

  void take_rows(const float* query, int64_t rows) { pack_unit_rows<parts>(query, size_, rows, kMostRows, query_); }

  void take_keys(const Segment& segment, int64_t tile, int width) {
    pack_tile(segment, &Source::key, problem_.dtype, tile, width, problem_.size, rows_);
    pack_keys_along<parts>(rows_, size_, width, keys_);
    pack_tile(segment, &Source::value, problem_.dtype, tile, width, problem_.value_size, rows_);
    pack_keys_down<parts>(rows_, value_size_, width, values_);
  }

  void score(int64_t row, int rows, const Seen& seen, float* scores) const {
    const Images keys{keys_, parts * kKeyTiles * kImage, kKeyTiles * kImage, kImage};
    multiply_images<parts, parts>(static_cast<int>(tiles_of(rows)), seen.vectors, steps_of(size_),
                                  unit_rows<parts>(query_, row, kMostRows), keys.at(seen.first / kTile * keys.next),
                                  scores + seen.first, kTileKeys, false);
  }

  // The weights of a few rows that see `here` of what their block sees.
  void clear_unseen(const Seen& seen, const Seen& here, int rows, float* weights) const {
    const int first = seen.first / kTileDepth * kTileDepth, end = static_cast<int>(round_up(seen.end, kTileDepth));
    const bool some = here.vectors > 0;
    if (some && here.first == first && here.vectors * kLanes == end - first) return;
    for (int i = 0; i < rows; ++i) {
      clear_columns(weights + i * kTileKeys, first, some ? here.first : end);
      if (some) clear_columns(weights + i * kTileKeys, here.first + here.vectors * kLanes, end);
    }
  }

  // Weights outside of what a row sees are 0, and those of rows that are not there any number.
  void add_values(int rows, const Seen& seen, const float* weights, float* output) const {
    const int tall = static_cast<int>(tiles_of(rows)), first = seen.first / kTileDepth;
    const int end = static_cast<int>(ceiling(seen.end, kTileDepth));
    pack_weights<weight_parts>(weights, tall, first, end, weights_);
    const Images left{weights_, weight_parts * tall * kImage, tall * kImage, kImage};
    const Images right{values_, parts * tiles_of(value_size_) * kImage, tiles_of(value_size_) * kImage, kImage};
    const bool whole = rows % kTile == 0;  // or the rows behind them would change, if only from -0 to 0
    multiply_images<weight_parts, parts>(tall, static_cast<int>(tiles_of(value_size_)), end - first,
                                         left.at(first * left.step), right.at(first * right.step), whole ? output : part_,
                                         value_size_, whole);
    for (int64_t i = 0; i < rows * value_size_ && !whole; i += kLanes) store(output + i, load(output + i) + load(part_ + i));
  }

 private:
  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float *rows_, *part_;                    // [kTileKeys, D or Dv], [kBlockRows, Dv]
  char *query_, *keys_, *values_, *weights_;  // images
};

// The gradients of keys are summed over the rows of a unit as their own transposes, dVᵀ += dOᵀ P and dKᵀ += Qᵀ dS: then P
// and dS are packed as they lie, and what has to be transposed, Q and dO, is packed once for all keys. Pieces of a unit
// begin at rows that are multiples of kTileDepth, so that no step of the depth has rows of two.
template <int parts, int weight_parts>
class TileBackward {
 public:
  static constexpr int kColumns = kTileDepth;
  static constexpr int64_t kRowsOfTile = 8;
  static constexpr int64_t kBlockTiles = kBlockRows / kRowsOfTile;
  static_assert(kBlockTiles <= kMostRowTiles && kBlockRows % kTileDepth == 0);
  static FixedBlocks row_tiles(int64_t rows) { return {rows, kRowsOfTile}; }

  TileBackward(const AttentionProblem& problem, Arena& arena)
      : problem_(problem), size_(round_up(problem.size, kLanes)), value_size_(round_up(problem.value_size, kLanes)) {
    const int64_t tiles = tiles_of(size_), value_tiles = tiles_of(value_size_);
    rows_ = arena.take<float>(kTileKeys * most(size_, value_size_));
    query_ = arena.take<char>(steps_of(size_) * parts * kUnitRows * kImageRow);
    grad_out_ = arena.take<char>(steps_of(value_size_) * parts * kUnitRows * kImageRow);
    query_down_ = arena.take<char>(kUnitRows / kTileDepth * parts * tiles * kImage);
    grad_out_down_ = arena.take<char>(kUnitRows / kTileDepth * parts * value_tiles * kImage);
    keys_ = arena.take<char>(steps_of(size_) * parts * kKeyTiles * kImage);
    values_ = arena.take<char>(steps_of(value_size_) * parts * kKeyTiles * kImage);
    keys_down_ = arena.take<char>(kKeySteps * parts * tiles * kImage);
    left_ = arena.take<char>(kKeySteps * weight_parts * (kBlockRows / kTile) * kImage);
    right_ = arena.take<char>(kBlockRows / kTileDepth * weight_parts * kKeyTiles * kImage);
    grad_keys_ = arena.take<float>(size_ * kTileKeys);
    grad_values_ = arena.take<float>(value_size_ * kTileKeys);
  }

  void take_rows(const float* query, const float* grad_out, int64_t rows) {
    pack_unit_rows<parts>(query, size_, rows, kUnitRows, query_);
    pack_unit_rows<parts>(grad_out, value_size_, rows, kUnitRows, grad_out_);
    pack_unit_columns(query, size_, rows, query_down_);
    pack_unit_columns(grad_out, value_size_, rows, grad_out_down_);
  }

  void take_keys(const Segment& segment, int64_t tile, int width) {
    pack_tile(segment, &Source::key, problem_.dtype, tile, width, problem_.size, rows_);
    pack_keys_along<parts>(rows_, size_, width, keys_);
    pack_keys_down<parts>(rows_, size_, width, keys_down_);
    pack_tile(segment, &Source::value, problem_.dtype, tile, width, problem_.value_size, rows_);
    pack_keys_along<parts>(rows_, value_size_, width, values_);
    for (int64_t i = 0; i < size_ * kTileKeys; i += kLanes) store(grad_keys_ + i, Vec{});
    for (int64_t i = 0; i < value_size_ * kTileKeys; i += kLanes) store(grad_values_ + i, Vec{});
  }

  void score(const Block& block, float* scores, float* grad) const {
    const int tall = static_cast<int>(tiles_of(block.rows())), wide = (block.end - block.begin) / kTile;
    const auto right = [&](const char* images) __attribute__((always_inline)) {
      return Images{images + block.begin / kTile * kImage, parts * kKeyTiles * kImage, kKeyTiles * kImage, kImage};
    };
    multiply_images<parts, parts>(tall, wide, steps_of(size_), unit_rows<parts>(query_, block.row[0], kUnitRows),
                                  right(keys_), scores + block.begin, kTileKeys, false);
    multiply_images<parts, parts>(tall, wide, steps_of(value_size_),
                                  unit_rows<parts>(grad_out_, block.row[0], kUnitRows), right(values_),
                                  grad + block.begin, kTileKeys, false);
  }

  // Rows up to a step of the depth count as 0.
  void take_weights(const Block& block, float* weights, float* grad_scores) const {
    for (int64_t i = block.rows(); i < round_up(block.rows(), kTileDepth); ++i) {
      clear_columns(weights + i * kTileKeys, block.begin, block.end);
      clear_columns(grad_scores + i * kTileKeys, block.begin, block.end);
    }
  }

  void add_grad_query(const Block& block, const float* grad_scores, float* grad_query) const {
    const int tall = static_cast<int>(tiles_of(block.rows())), tiles = static_cast<int>(tiles_of(size_));
    const int first = block.begin / kTileDepth, end = block.end / kTileDepth;
    pack_weights<weight_parts>(grad_scores, tall, first, end, left_);
    const Images left{left_, weight_parts * tall * kImage, tall * kImage, kImage};
    const Images right{keys_down_, parts * tiles * kImage, tiles * kImage, kImage};
    multiply_images<weight_parts, parts>(tall, tiles, end - first, left.at(first * left.step),
                                         right.at(first * right.step), grad_query + block.row[0] * size_, size_, true);
  }

  void add_grad_keys(const KeysOfTile& keys, const Block& block, const float* weights, const float* grad_scores) const {
    bool by_key = false, by_value = false;
    keys.for_each([&](int, int, int64_t, const KeySum& sum) {
      by_key |= sum.key != nullptr;
      by_value |= sum.value != nullptr;
    });
    if (by_value) add_grad(block, weights, grad_out_down_, value_size_, grad_values_);
    if (by_key) add_grad(block, grad_scores, query_down_, size_, grad_keys_);
  }

  void finish_keys(const KeysOfTile& keys) const {
    keys.for_each([&](int begin, int end, int64_t first_key, const KeySum& sum) {
      if (sum.key != nullptr) add_transposed(grad_keys_, size_, begin, end, sum.key + first_key * size_);
      if (sum.value != nullptr) add_transposed(grad_values_, value_size_, begin, end, sum.value + first_key * value_size_);
    });
  }

 private:
  // Rows of a unit as the left side of a product over rows: [steps][parts][tiles of size] images.
  void pack_unit_columns(const float* rows, int64_t size, int64_t count, char* images) const {
    const int64_t tiles = tiles_of(size);
    for (int64_t row = 0; row < count; row += kTileDepth) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        pack_down<parts, true>(rows + row * size + tile * kTile, size, kTile, static_cast<int>(least(kTileDepth, count - row)),
                               images + (row / kTileDepth * parts * tiles + tile) * kImage, tiles * kImage);
      }
    }
  }

  // sum [size, kTileKeys] += rowsᵀ weights, over the rows of a block.
  void add_grad(const Block& block, const float* weights, const char* rows, int64_t size, float* sum) const {
    const int64_t tiles = tiles_of(size), steps = ceiling(block.rows(), kTileDepth);
    const int wide = (block.end - block.begin) / kTile;
    for (int64_t s = 0; s < steps; ++s) {
      for (int tile = 0; tile < wide; ++tile) {
        pack_down<weight_parts, false>(weights + s * kTileDepth * kTileKeys + block.begin + tile * kTile, kTileKeys, kTile,
                                       kTileDepth, right_ + (s * weight_parts * wide + tile) * kImage, wide * kImage);
      }
    }
    const Images left{rows + block.row[0] / kTileDepth * parts * tiles * kImage, parts * tiles * kImage, tiles * kImage,
                      kImage};
    const Images right{right_, weight_parts * wide * kImage, wide * kImage, kImage};
    multiply_images<parts, weight_parts>(static_cast<int>(tiles), wide, steps, left, right, sum + block.begin, kTileKeys,
                                         true);
  }

  // target [end - begin, size] += the columns [begin, end) of sum [size, kTileKeys].
  static void add_transposed(const float* sum, int64_t size, int begin, int end, float* target) {
    for (int column = begin / kTile * kTile; column < end; column += kTile) {
      for (int64_t d = 0; d < size; d += kTile) {
        Vec block[kTile];
        SPK_UNROLL for (int i = 0; i < kTile; ++i) block[i] = load(sum + (d + i) * kTileKeys + column);
        transpose(block);
        for (int i = 0; i < kTile; ++i) {
          if (column + i < begin || column + i >= end) continue;
          float* const at = target + (column + i - begin) * size + d;
          store(at, load(at) + block[i]);
        }
      }
    }
  }

  const AttentionProblem& problem_;
  int64_t size_, value_size_;
  float* rows_;                               // [kTileKeys, D or Dv]
  char *query_, *grad_out_;                   // images, products over D and Dv
  char *query_down_, *grad_out_down_;         // products over rows
  char *keys_, *values_, *keys_down_;         // products over D and Dv, and over keys
  char *left_, *right_;                       // of dS over keys, of P or dS over rows
  float *grad_keys_, *grad_values_;           // [D, kTileKeys], [Dv, kTileKeys]
};

}  // namespace softprompt::SPK_ISA
