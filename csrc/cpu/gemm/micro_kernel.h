// C[rows, columns] = or += A[rows, depth] B[depth, columns] on packed fp32, from register tiles.
//
// A register tile is kTileRows rows of kTileVectors vectors: each step of the depth loads one row of B and multiplies it
// by kTileRows broadcast elements of A. With 32 vector registers that is 24 accumulators, 4 vectors of B and 1 of A: 10
// loads for 24 multiply-adds, more than the 8 that hide their latency. A is read in place, by rows or by columns, so a
// product with a transposed left side costs no transposition. What C held is added last: a sum of sums keeps more digits
// than one long one.
#pragma once

#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

enum class Layout { rows, columns };  // element (i, k) of A lies at a[i * lda + k], or at a[k * lda + i]

template <Layout layout, int rows, int vectors>
static void register_tile(int64_t depth, const float* __restrict a, int64_t lda, const float* __restrict b,
                          int64_t ldb, float* __restrict c, int64_t ldc, bool accumulate) {
  Vec sum[rows][vectors];
  SPK_UNROLL for (int i = 0; i < rows; ++i) {
    SPK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] = Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[vectors];
    SPK_UNROLL for (int j = 0; j < vectors; ++j) right[j] = load(b + j * kLanes);
    SPK_UNROLL for (int i = 0; i < rows; ++i) {
      const Vec left = splat(layout == Layout::rows ? a[i * lda] : a[i]);
      SPK_UNROLL for (int j = 0; j < vectors; ++j) sum[i][j] += left * right[j];
    }
    a += layout == Layout::rows ? 1 : lda;
    b += ldb;
  }
  SPK_UNROLL for (int i = 0; i < rows; ++i) {
    SPK_UNROLL for (int j = 0; j < vectors; ++j) {
      float* const at = c + i * ldc + j * kLanes;
      store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
    }
  }
}

using RegisterTile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool);

template <Layout layout, int vectors>
SPK_INLINE RegisterTile choose_tile(int rows) {
  static constexpr RegisterTile tiles[] = {register_tile<layout, 1, vectors>, register_tile<layout, 2, vectors>,
                                           register_tile<layout, 3, vectors>, register_tile<layout, 4, vectors>,
                                           register_tile<layout, 5, vectors>, register_tile<layout, 6, vectors>};
  static_assert(kTileRows == 6);
  return tiles[rows - 1];
}

// Up to kTileRows rows; `columns` is a multiple of kLanes.
template <Layout layout>
static void gemm_rows(int rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  while (columns >= kTileVectors * kLanes) {
    choose_tile<layout, kTileVectors>(rows)(depth, a, lda, b, ldb, c, ldc, accumulate);
    b += kTileVectors * kLanes;
    c += kTileVectors * kLanes;
    columns -= kTileVectors * kLanes;
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

// `count` things in blocks of at most `most`, of nearly equal size: block i of how many starts where.
struct Blocks {
  int64_t count, blocks;
  Blocks(int64_t count, int64_t most) : count(count), blocks((count + most - 1) / most) {}
  int64_t start(int64_t block) const { return count * block / blocks; }
};

// In blocks of `most`, but for the last.
struct FixedBlocks {
  int64_t count, blocks, most;
  FixedBlocks(int64_t count, int64_t most) : count(count), blocks((count + most - 1) / most), most(most) {}
  int64_t start(int64_t block) const { return block < blocks ? block * most : count; }
};

}  // namespace softprompt::SPK_ISA
