// The GEMM of fp32 vectors: C [rows, columns] = or += A [rows, depth] B [depth, columns].
//
// It computes one register tile at a time: kRegisterRows rows of kRegisterVectors vectors of C. Each step of the depth
// loads one row of B and multiplies it by kRegisterRows broadcast elements of A. With 32 vector registers that is 24
// accumulators, 4 vectors of B and 1 of A: 10 loads for 24 multiply-adds. 8 multiply-adds would hide their latency.
// A is read in place, row-major or column-major, so a transposed A is not transposed in memory. The old value of C is
// added last: a sum of partial sums is more accurate than one long sum.
#pragma once

#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

constexpr int kRegisterRows = 6;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kRegisterVectors = 4;
#else
constexpr int kRegisterVectors = 2;
#endif

enum class Layout { row_major, column_major };  // element (i, k) of A lies at a[i * lda + k], or at a[k * lda + i]

template <Layout layout, int rows, int vectors>
static void register_tile(int64_t depth, const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb,
                          float* __restrict c, int64_t ldc, bool accumulate) {
  Vec accumulator[rows][vectors];
  SPK_UNROLL for (int i = 0; i < rows; ++i) { SPK_UNROLL for (int j = 0; j < vectors; ++j) accumulator[i][j] = Vec{}; }
  for (int64_t k = 0; k < depth; ++k) {
    Vec b_row[vectors];
    SPK_UNROLL for (int j = 0; j < vectors; ++j) b_row[j] = load(b + j * kLanes);
    SPK_UNROLL for (int i = 0; i < rows; ++i) {
      const Vec a_element = splat(layout == Layout::row_major ? a[i * lda] : a[i]);
      SPK_UNROLL for (int j = 0; j < vectors; ++j) accumulator[i][j] += a_element * b_row[j];
    }
    a += layout == Layout::row_major ? 1 : lda;
    b += ldb;
  }
  SPK_UNROLL for (int i = 0; i < rows; ++i) {
    SPK_UNROLL for (int j = 0; j < vectors; ++j) {
      float* const at = c + i * ldc + j * kLanes;
      store(at, accumulate ? load(at) + accumulator[i][j] : accumulator[i][j]);
    }
  }
}

using RegisterTile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool);

template <Layout layout, int vectors>
SPK_INLINE RegisterTile choose_tile(int rows) {
  static constexpr RegisterTile tiles[] = {register_tile<layout, 1, vectors>, register_tile<layout, 2, vectors>,
                                           register_tile<layout, 3, vectors>, register_tile<layout, 4, vectors>,
                                           register_tile<layout, 5, vectors>, register_tile<layout, 6, vectors>};
  static_assert(kRegisterRows == 6);
  return tiles[rows - 1];
}

// At most kRegisterRows rows. `columns` is a multiple of kLanes.
template <Layout layout>
static void gemm_rows(int rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  while (columns >= kRegisterVectors * kLanes) {
    choose_tile<layout, kRegisterVectors>(rows)(depth, a, lda, b, ldb, c, ldc, accumulate);
    b += kRegisterVectors * kLanes;
    c += kRegisterVectors * kLanes;
    columns -= kRegisterVectors * kLanes;
  }
  RegisterTile tile = nullptr;
  switch (columns / kLanes) {
    case 0: return;
    case 1: tile = choose_tile<layout, 1>(rows); break;
#if defined(__AVX512F__) || defined(__ARM_NEON)
    case 2: tile = choose_tile<layout, 2>(rows); break;
    default: tile = choose_tile<layout, 3>(rows); break;
#endif
  }
  tile(depth, a, lda, b, ldb, c, ldc, accumulate);
}

// Divides `count` items into blocks of nearly equal size, at most `limit`. start(i) is the first item of block i.
struct EvenBlocks {
  int64_t count, blocks;
  EvenBlocks(int64_t count, int64_t limit) : count(count), blocks((count + limit - 1) / limit) {}
  int64_t start(int64_t block) const { return count * block / blocks; }
};

// Divides `count` items into blocks of `size`; the last may be smaller.
struct FixedBlocks {
  int64_t count, blocks, size;
  FixedBlocks(int64_t count, int64_t size) : count(count), blocks((count + size - 1) / size), size(size) {}
  int64_t start(int64_t block) const { return block < blocks ? block * size : count; }
};

}  // namespace softprompt::SPK_ISA
