// GEMM of fp32 accuracy from bf16 tiles, on the matrix unit (AMX) of x86 processors.
//
// A tile register holds 16 rows of 64 bytes. One instruction computes C += A B for a bf16 tile A [16 x 32], a bf16 tile
// B [32 x 16] and an fp32 tile C [16 x 16]. It takes 16 cycles: sixteen times the rate of fp32 vectors.
//
// Splitting. An fp32 number x is the sum of three bf16 parts,
//
//     h = x truncated to 8 bits      m = x - h truncated to 8 bits      l = x - h - m,
//
// exactly, because both differences are exact. So x y = hh' + hm' + mh' + hl' + mm' + lh' with an error of 2^-24 x y
// (2^-21 at most). Parts i and j of the two operands are multiplied if i + j <= 2. That is six bf16 GEMMs, at 2.7 times
// the rate of fp32 vectors (2.2 times where the processor lowers its clock under this load). bf16 has one such part and
// fp16 two. An fp32 operand that only has to be as exact as these is split in two.
//
// Rounding. The instruction first sums the 32 neighbouring terms, from 0, and then adds them to C. So the sum over the
// six GEMMs is rounded less often than one chain of fp32 multiply-adds. Two things differ from fp32: numbers below
// 2^-126 count as 0, so numbers below 2^-110 lose their low parts; and an infinity makes the sum NaN, because it is
// also multiplied by parts that are 0.
//
// Packed tiles. In memory a tile of either operand is packed as 16 rows of 16 pairs. A pair is two numbers along the
// depth (the inner dimension of the GEMM). Which two does not matter as long as A and B agree. Here they are p and
// p + 16 of 32, so that two vectors are paired lane by lane, without shuffles:
//
//     A [16 x 32]: packed[i][p] = A[i][p], A[i][p + 16]      B [32 x 16]: packed[p][j] = B[p][j], B[p + 16][j]
//
// So the packed tile of a transposed matrix as one operand is the transpose of its packed tile as the other operand.
#pragma once

#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

constexpr int kAmxTile = 16;   // rows of a tile of A, columns of a tile of B
constexpr int kAmxDepth = 32;  // the depth that one instruction sums over
constexpr int64_t kAmxRowBytes = 64;
constexpr int64_t kAmxTileBytes = kAmxTile * kAmxRowBytes;
static_assert(kLanes == kAmxTile);

// --- instructions ----------------------------------------------------------------------------------------------------
//
// Inline assembly instead of intrinsics: GCC's intrinsics do not tell the compiler which memory a load reads.

// Configures the thread's tile registers as 16 rows of 64 bytes each, until it is destroyed.
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
SPK_INLINE void load_tile(const void* rows, int64_t stride) {  // stride in bytes
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

// Register c += register a times register b.
template <int c, int a, int b>
SPK_INLINE void multiply_add_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// --- parts and packed tiles ------------------------------------------------------------------------------------------

// Splits x into bf16 parts. Each part is the upper half of its lane; the lower half of the last part is the remainder.
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

// The first `count` lanes; 0 in the others. `count` may be negative or larger than kLanes.
template <class T>
SPK_INLINE Vec load_up_to(const T* p, int count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  if (count > 0) __builtin_memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

// Writes the packed tiles of all parts, `part_bytes` apart. row(i, pairs) sets `pairs` to row i of each part.
template <int parts, bool transposed, class Row>
SPK_INLINE void write_packed_tiles(char* packed, int64_t part_bytes, Row row) {
  UintVec rows[parts][kAmxTile];
  for (int i = 0; i < kAmxTile; ++i) {
    UintVec pairs[parts];
    row(i, pairs);
    SPK_UNROLL for (int p = 0; p < parts; ++p) {
      if (transposed) rows[p][i] = pairs[p];
      if (!transposed) store(reinterpret_cast<float*>(packed + p * part_bytes + i * kAmxRowBytes), (Vec)pairs[p]);
    }
  }
  SPK_UNROLL for (int p = 0; p < parts && transposed; ++p) {
    Vec columns[kAmxTile];
    SPK_UNROLL for (int i = 0; i < kAmxTile; ++i) columns[i] = (Vec)rows[p][i];
    transpose(columns);
    SPK_UNROLL for (int i = 0; i < kAmxTile; ++i) {
      store(reinterpret_cast<float*>(packed + p * part_bytes + i * kAmxRowBytes), columns[i]);
    }
  }
}

// Packs x [count <= 16, depth], whose inner dimension is the depth; its rows are `stride` elements apart. Not
// transposed it is a tile of A, else one of B.
template <int parts, bool transposed, class T>
static void pack_depth_inner(const T* x, int64_t stride, int count, int depth, char* packed, int64_t part_bytes) {
  if (count == kAmxTile && depth >= kAmxDepth) {
    write_packed_tiles<parts, transposed>(packed, part_bytes,
                                          [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
                                            split_pairs(load(x + i * stride), load(x + i * stride + kAmxTile), pairs);
                                          });
    return;
  }
  write_packed_tiles<parts, transposed>(
      packed, part_bytes, [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
        const int here = i < count ? depth : 0;
        const T* const at = x + i * stride;
        split_pairs(load_up_to(at, here), load_up_to(at + kAmxTile, here - kAmxTile), pairs);
      });
}

// Packs x [depth, count <= 16], whose outer dimension is the depth. Not transposed it is a tile of B, else one of A.
template <int parts, bool transposed, class T>
static void pack_depth_outer(const T* x, int64_t stride, int count, int depth, char* packed, int64_t part_bytes) {
  if (count == kAmxTile && depth >= kAmxDepth) {
    write_packed_tiles<parts, transposed>(packed, part_bytes,
                                          [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
                                            split_pairs(load(x + i * stride), load(x + (i + kAmxTile) * stride), pairs);
                                          });
    return;
  }
  write_packed_tiles<parts, transposed>(
      packed, part_bytes, [&](int i, UintVec(&pairs)[parts]) __attribute__((always_inline)) {
        const T* const at = x + i * stride;
        split_pairs(load_up_to(at, i < depth ? count : 0),
                    load_up_to(at + kAmxTile * stride, i + kAmxTile < depth ? count : 0), pairs);
      });
}

// --- GEMM ------------------------------------------------------------------------------------------------------------

// The packed tiles of one operand. From `first` on they are so many bytes apart: `step` along the depth, `part` to the
// next bf16 part, `next` to the next 16 rows of A or columns of B.
struct PackedTiles {
  const char* first;
  int64_t step, part, next;
  PackedTiles at(int64_t bytes) const { return {first + bytes, step, part, next}; }
};

// Part a of A is multiplied by part b of B.
struct PartPair {
  int a, b;
};

// The pairs of parts to multiply. Each pair shares a part with the pair before it, so that fewer tiles are loaded.
template <int a_parts, int b_parts>
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

// One step of the depth. Registers 0 to 3 hold the accumulators of up to 2 x 2 tiles, 4 and 5 hold A, 6 and 7 hold B.
template <int rows, int columns, int a_parts, int b_parts, int at = 0>
SPK_INLINE void multiply_step(const char* a_tile, const char* b_tile, const PackedTiles& a, const PackedTiles& b) {
  using Pairs = PartPairs<a_parts, b_parts>;
  constexpr int count = sizeof(Pairs::order) / sizeof(PartPair);
  if constexpr (at < count) {
    constexpr PartPair now = Pairs::order[at];
    constexpr PartPair before = at > 0 ? Pairs::order[at > 0 ? at - 1 : 0] : PartPair{-1, -1};
    if constexpr (now.a != before.a) {
      load_tile<4>(a_tile + now.a * a.part, kAmxRowBytes);
      if constexpr (rows > 1) load_tile<5>(a_tile + now.a * a.part + a.next, kAmxRowBytes);
    }
    if constexpr (now.b != before.b) {
      load_tile<6>(b_tile + now.b * b.part, kAmxRowBytes);
      if constexpr (columns > 1) load_tile<7>(b_tile + now.b * b.part + b.next, kAmxRowBytes);
    }
    multiply_add_tile<0, 4, 6>();
    if constexpr (columns > 1) multiply_add_tile<1, 4, 7>();
    if constexpr (rows > 1) multiply_add_tile<2, 5, 6>();
    if constexpr (rows > 1 && columns > 1) multiply_add_tile<3, 5, 7>();
    multiply_step<rows, columns, a_parts, b_parts, at + 1>(a_tile, b_tile, a, b);
  }
}

// A block of rows x columns tiles, each 1 or 2.
template <int rows, int columns, int a_parts, int b_parts>
static void multiply_block(int64_t steps, const PackedTiles& a, const PackedTiles& b, float* out, int64_t stride,
                           bool accumulate) {
  const int64_t bytes = stride * 4;
  float* const second = out + kAmxTile * stride;
  if (accumulate) {
    load_tile<0>(out, bytes);
    if constexpr (columns > 1) load_tile<1>(out + kAmxTile, bytes);
    if constexpr (rows > 1) load_tile<2>(second, bytes);
    if constexpr (rows > 1 && columns > 1) load_tile<3>(second + kAmxTile, bytes);
  } else {
    clear_tile<0>();
    if constexpr (columns > 1) clear_tile<1>();
    if constexpr (rows > 1) clear_tile<2>();
    if constexpr (rows > 1 && columns > 1) clear_tile<3>();
  }
  const char *a_tile = a.first, *b_tile = b.first;
  for (int64_t s = 0; s < steps; ++s, a_tile += a.step, b_tile += b.step) {
    multiply_step<rows, columns, a_parts, b_parts>(a_tile, b_tile, a, b);
  }
  store_tile<0>(out, bytes);
  if constexpr (columns > 1) store_tile<1>(out + kAmxTile, bytes);
  if constexpr (rows > 1) store_tile<2>(second, bytes);
  if constexpr (rows > 1 && columns > 1) store_tile<3>(second + kAmxTile, bytes);
}

// out [rows * 16, columns * 16] = or += A B, over a depth of steps * 32. Rows of out are `stride` elements apart.
template <int a_parts, int b_parts>
static void multiply_packed(int rows, int columns, int64_t steps, const PackedTiles& a, const PackedTiles& b,
                            float* out, int64_t stride, bool accumulate) {
  for (int i = 0; i < rows; i += 2) {
    for (int j = 0; j < columns; j += 2) {
      const bool two_rows = i + 1 < rows, two_columns = j + 1 < columns;
      const auto block =
          two_rows ? (two_columns ? multiply_block<2, 2, a_parts, b_parts> : multiply_block<2, 1, a_parts, b_parts>)
                   : (two_columns ? multiply_block<1, 2, a_parts, b_parts> : multiply_block<1, 1, a_parts, b_parts>);
      block(steps, a.at(i * a.next), b.at(j * b.next), out + (i * stride + j) * kAmxTile, stride, accumulate);
    }
  }
}

}  // namespace softprompt::SPK_ISA
