// Products of fp32 accuracy from bf16 tiles: the matrix unit (AMX) of x86 processors.
//
// A tile register holds 16 rows of 64 bytes, and one instruction multiplies 16 x 32 by 32 x 16 bf16 numbers and adds to
// 16 x 16 fp32 sums, in 16 cycles: sixteen times the rate of fp32 vectors. A number x of fp32 is the sum of three of bf16,
//
//     h = x cut to 8 bits      m = x - h cut to 8 bits      l = x - h - m,
//
// exactly, as both differences are exact. So x y = hh' + hm' + mh' + hl' + mm' + lh' but for 2^-24 x y (2^-21 at most): six
// products, 2.7 times the rate of fp32 vectors (2.2 times where the clock falls with the heat of it). bf16 has one such part
// and fp16 two, and what is only as exact as they are needs two. Parts i and j of the two sides are multiplied where
// i + j <= 2.
//
// The instruction sums the products of 32 neighbours from 0 before it adds them, so sums of 6 products of a depth are
// rounded less often than one chain of fp32 multiply-adds. What is not like fp32: numbers below 2^-126 count as 0, so
// those below 2^-110 lose their low parts; and a sum with an infinity is NaN, as infinity times the part 0 is.
//
// In memory a tile of either side is an image of 16 rows of 16 pairs, each pair two numbers of the depth. Which two is free
// as long as both sides agree; here they are p and p + 16 of 32, so that vectors are paired lane by lane, without shuffles:
//
//     left  [16 x 32], image[i][p] = X[i][p], X[i][p + 16]      right [32 x 16], image[p][j] = Y[p][j], Y[p + 16][j]
//
// An image of a transposed matrix is the transpose of the image for the other side.
#pragma once

#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

constexpr int kTile = 16;                    // rows or columns of a tile
constexpr int kTileDepth = 32;               // that one instruction sums over
constexpr int64_t kImageRow = 64;            // bytes
constexpr int64_t kImage = kTile * kImageRow;
static_assert(kLanes == kTile);

// --- instructions ----------------------------------------------------------------------------------------------------
//
// Not the compiler's intrinsics: GCC's tell it nothing of the memory that a load reads.

// While it lives, the thread's tile registers are 16 rows of 64 bytes each.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const all;
    static_assert(sizeof(all) == 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(all));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int tile>
SPK_INLINE void load_tile(const void* rows, int64_t stride) {  // in bytes
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(rows), "r"(stride) : "memory");
}

template <int tile>
SPK_INLINE void store_tile(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(rows), "r"(stride) : "memory");
}

template <int tile>
SPK_INLINE void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int sum, int left, int right>
SPK_INLINE void multiply_add_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

// --- parts and images ------------------------------------------------------------------------------------------------

// Each part in the upper half of its lane; the lower half of the last one is what is left over.
template <int parts>
SPK_INLINE void split(Vec x, UintVec (&part)[parts]) {
  SPK_UNROLL for (int i = 0; i + 1 < parts; ++i) {
    part[i] = (UintVec)x & 0xffff0000u;
    x -= (Vec)part[i];
  }
  part[parts - 1] = (UintVec)x;
}

template <int parts>
SPK_INLINE void split_pairs(Vec first, Vec second, UintVec (&pairs)[parts]) {
  UintVec low[parts], high[parts];
  split(first, low);
  split(second, high);
  SPK_UNROLL for (int i = 0; i < parts; ++i) pairs[i] = (low[i] >> 16) | (high[i] & 0xffff0000u);
}

// The first `count` lanes, which may be any number, 0 in the others.
template <class T>
SPK_INLINE Vec load_up_to(const T* p, int count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  if (count > 0) __builtin_memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

// Writes the images of each part, `part_bytes` apart. row(i, pairs) gives row i of them.
template <int parts, bool transposed, class Row>
SPK_INLINE void write_images(char* images, int64_t part_bytes, Row row) {
  UintVec rows[parts][kTile];
  for (int i = 0; i < kTile; ++i) {
    UintVec pairs[parts];
    row(i, pairs);
    SPK_UNROLL for (int p = 0; p < parts; ++p) {
      if (transposed) rows[p][i] = pairs[p];
      if (!transposed) store(reinterpret_cast<float*>(images + p * part_bytes + i * kImageRow), (Vec)pairs[p]);
    }
  }
  SPK_UNROLL for (int p = 0; p < parts && transposed; ++p) {
    Vec image[kTile];
    SPK_UNROLL for (int i = 0; i < kTile; ++i) image[i] = (Vec)rows[p][i];
    transpose(image);
    SPK_UNROLL for (int i = 0; i < kTile; ++i) {
      store(reinterpret_cast<float*>(images + p * part_bytes + i * kImageRow), image[i]);
    }
  }
}

// Images of the rows x [count <= 16, depth], `stride` elements apart, whose depth lies along a row: as they are for the
// left side, transposed for the right side.
template <int parts, bool transposed, class T>
static void pack_along(const T* x, int64_t stride, int count, int depth, char* images, int64_t part_bytes) {
  if (count == kTile && depth >= kTileDepth) {
    write_images<parts, transposed>(images, part_bytes, [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
      split_pairs(load(x + i * stride), load(x + i * stride + kTile), pairs);
    });
    return;
  }
  write_images<parts, transposed>(images, part_bytes, [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
    const int here = i < count ? depth : 0;
    const T* const at = x + i * stride;
    split_pairs(load_up_to(at, here), load_up_to(at + kTile, here - kTile), pairs);
  });
}

// Images of x [depth, count <= 16], whose depth runs over the rows: as they are for the right side, transposed for the
// left side.
template <int parts, bool transposed, class T>
static void pack_down(const T* x, int64_t stride, int count, int depth, char* images, int64_t part_bytes) {
  if (count == kTile && depth >= kTileDepth) {
    write_images<parts, transposed>(images, part_bytes, [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
      split_pairs(load(x + i * stride), load(x + (i + kTile) * stride), pairs);
    });
    return;
  }
  write_images<parts, transposed>(images, part_bytes, [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
    const T* const at = x + i * stride;
    split_pairs(load_up_to(at, i < depth ? count : 0), load_up_to(at + kTile * stride, i + kTile < depth ? count : 0),
                pairs);
  });
}

// --- products --------------------------------------------------------------------------------------------------------

// Where the images of one side lie: bytes from one to the next along the depth, of another part, of the next 16 rows or
// columns.
struct Images {
  const char* first;
  int64_t step, part, next;
  Images at(int64_t bytes) const { return {first + bytes, step, part, next}; }
};

struct PartPair {
  int left, right;
};

// Pairs of parts in an order in which each shares a side with the one before it, so that fewer tiles are loaded.
template <int left_parts, int right_parts>
struct PartPairs;
template <>
struct PartPairs<1, 1> {
  static constexpr PartPair order[] = {{0, 0}};
};
template <>
struct PartPairs<1, 2> {
  static constexpr PartPair order[] = {{0, 1}, {0, 0}};
};
template <>
struct PartPairs<2, 1> {
  static constexpr PartPair order[] = {{1, 0}, {0, 0}};
};
template <>
struct PartPairs<1, 3> {
  static constexpr PartPair order[] = {{0, 2}, {0, 1}, {0, 0}};
};
template <>
struct PartPairs<3, 1> {
  static constexpr PartPair order[] = {{2, 0}, {1, 0}, {0, 0}};
};
template <>
struct PartPairs<2, 2> {
  static constexpr PartPair order[] = {{1, 1}, {1, 0}, {0, 0}, {0, 1}};
};
template <>
struct PartPairs<2, 3> {
  static constexpr PartPair order[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}};
};
template <>
struct PartPairs<3, 2> {
  static constexpr PartPair order[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}};
};
template <>
struct PartPairs<3, 3> {
  static constexpr PartPair order[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};
};

// Registers: sums in 0 to 3 by row and column of the block, tiles of the left side in 4 and 5, of the right side in 6 and 7.
template <int rows, int columns, int left_parts, int right_parts, int at = 0>
SPK_INLINE void multiply_step(const char* left, const char* right, const Images& a, const Images& b) {
  using Pairs = PartPairs<left_parts, right_parts>;
  constexpr int count = sizeof(Pairs::order) / sizeof(PartPair);
  if constexpr (at < count) {
    constexpr PartPair now = Pairs::order[at];
    constexpr PartPair before = at > 0 ? Pairs::order[at > 0 ? at - 1 : 0] : PartPair{-1, -1};
    if constexpr (now.left != before.left) {
      load_tile<4>(left + now.left * a.part, kImageRow);
      if constexpr (rows > 1) load_tile<5>(left + now.left * a.part + a.next, kImageRow);
    }
    if constexpr (now.right != before.right) {
      load_tile<6>(right + now.right * b.part, kImageRow);
      if constexpr (columns > 1) load_tile<7>(right + now.right * b.part + b.next, kImageRow);
    }
    multiply_add_tile<0, 4, 6>();
    if constexpr (columns > 1) multiply_add_tile<1, 4, 7>();
    if constexpr (rows > 1) multiply_add_tile<2, 5, 6>();
    if constexpr (rows > 1 && columns > 1) multiply_add_tile<3, 5, 7>();
    multiply_step<rows, columns, left_parts, right_parts, at + 1>(left, right, a, b);
  }
}

template <int rows, int columns, int left_parts, int right_parts>
static void multiply_block(int64_t steps, const Images& left, const Images& right, float* out, int64_t stride,
                           bool accumulate) {
  const int64_t bytes = stride * 4;
  float* const second = out + kTile * stride;
  if (accumulate) {
    load_tile<0>(out, bytes);
    if constexpr (columns > 1) load_tile<1>(out + kTile, bytes);
    if constexpr (rows > 1) load_tile<2>(second, bytes);
    if constexpr (rows > 1 && columns > 1) load_tile<3>(second + kTile, bytes);
  } else {
    clear_tile<0>();
    if constexpr (columns > 1) clear_tile<1>();
    if constexpr (rows > 1) clear_tile<2>();
    if constexpr (rows > 1 && columns > 1) clear_tile<3>();
  }
  const char *a = left.first, *b = right.first;
  for (int64_t s = 0; s < steps; ++s, a += left.step, b += right.step) {
    multiply_step<rows, columns, left_parts, right_parts>(a, b, left, right);
  }
  store_tile<0>(out, bytes);
  if constexpr (columns > 1) store_tile<1>(out + kTile, bytes);
  if constexpr (rows > 1) store_tile<2>(second, bytes);
  if constexpr (rows > 1 && columns > 1) store_tile<3>(second + kTile, bytes);
}

// out [rows * 16, columns * 16], rows `stride` apart, = or += left right, over `steps` * 32 of depth.
template <int left_parts, int right_parts>
static void multiply_images(int rows, int columns, int64_t steps, const Images& left, const Images& right, float* out,
                            int64_t stride, bool accumulate) {
  for (int i = 0; i < rows; i += 2) {
    for (int j = 0; j < columns; j += 2) {
      const bool two_rows = i + 1 < rows, two_columns = j + 1 < columns;
      const auto block = two_rows ? (two_columns ? multiply_block<2, 2, left_parts, right_parts>
                                                 : multiply_block<2, 1, left_parts, right_parts>)
                                  : (two_columns ? multiply_block<1, 2, left_parts, right_parts>
                                                 : multiply_block<1, 1, left_parts, right_parts>);
      block(steps, left.at(i * left.next), right.at(j * right.next), out + (i * stride + j) * kTile, stride, accumulate);
    }
  }
}

}  // namespace softprompt::SPK_ISA
