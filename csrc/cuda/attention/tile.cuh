// Tiles of rows of 16-bit numbers in shared memory, and fragments of them in registers.
//
// A row of D numbers is D / 8 chunks of 16 bytes. Chunks are stored in another order in each row, so that both what
// copies them (neighbouring chunks of a row at a time) and what loads matrices (the same chunk of 8 rows) finds each of
// the 8 groups of banks once: chunk ^ (row & 7) where a row is a multiple of 128 bytes, and for D = 96, whose rows begin
// 64 bytes apart modulo 128, chunk ^ (row / 2 & 3).
#pragma once

#include "cuda/arch.cuh"

namespace softprompt {

constexpr int kLanesOfWarp = 32, kWarps = 4, kAttentionThreads = kWarps * kLanesOfWarp;
constexpr int kWarpRows = 16;  // of a product
constexpr int kBlockRows = kWarps * kWarpRows;

template <class T, int kRows, int kD>
struct alignas(128) Tile {
  static constexpr int kChunks = kD / 8;
  T numbers[kRows * kD];

  __device__ __forceinline__ static int offset(int row, int chunk) {
    const int turned = kD % 64 == 0 ? chunk ^ (row & 7) : chunk ^ (row / 2 & 3);
    return row * kD + turned * 8;
  }
  __device__ __forceinline__ T* at(int row, int chunk) { return numbers + offset(row, chunk); }
  __device__ __forceinline__ const T* at(int row, int chunk) const { return numbers + offset(row, chunk); }

  // Starts to copy rows from where `row_of(row)` says they begin; zeros where it says nullptr.
  template <class RowOf>
  __device__ __forceinline__ void copy_async(const RowOf& row_of) {
    for (int i = threadIdx.x; i < kRows * kChunks; i += kAttentionThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const T* from = row_of(row);
      arch::copy_16_async(at(row, chunk), from + chunk * 8, from != nullptr);
    }
  }

  // A [16, 16] of rows from `row` on, columns from 16 k on.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int row, int k) const {
    const int lane = threadIdx.x % kLanesOfWarp;
    arch::load_matrices(a, at(row + lane % 16, 2 * k + lane / 16));
  }

  // B [16, 16] = (rows from `row` on, columns from 16 k on) transposed: b[0], b[1] for its first 8 columns.
  __device__ __forceinline__ void load_b(uint32_t (&b)[4], int row, int k) const {
    const int lane = threadIdx.x % kLanesOfWarp;
    arch::load_matrices(b, at(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  }

  // B [16, 16] = rows from `row` on, columns from 16 n on: b[0], b[1] for its first 8 columns.
  __device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], int row, int n) const {
    const int lane = threadIdx.x % kLanesOfWarp;
    arch::load_matrices_transposed(b, at(row + lane % 16, 2 * n + lane / 16));
  }
};

// Works on tiles 0 to count - 1, each while the next is on its way to the other of two stages. `copy(index, stage)` starts
// a tile's copies and makes a group of them; that of the first tile has been called.
template <class Copy, class Work>
__device__ __forceinline__ void for_each_tile(int count, const Copy& copy, const Work& work) {
  for (int index = 0; index < count; ++index) {
    if (index + 1 < count) {
      copy(index + 1, (index + 1) % 2);
      arch::wait_for_copies<1>();
    } else {
      arch::wait_for_copies<0>();
    }
    __syncthreads();
    work(index, index % 2);
    __syncthreads();  // or the copies after the next would overwrite what others still read
  }
}

// A warp's sums [16, 8 kTiles]: lane 4 g + t has columns 8 j + 2 t and the next of rows g and g + 8.
template <int kTiles>
using Sums = float[kTiles][4];

template <class T>
__device__ __forceinline__ uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
}

// sums [16, rows of `right`] += left [16, kD] right^T, of `left`'s rows from `row` on.
template <class T, int kLeft, int kRight, int kD>
__device__ __forceinline__ void add_scores(Sums<kRight / 8>& sums, const Tile<T, kLeft, kD>& left, int row,
                                           const Tile<T, kRight, kD>& right) {
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[4], b[4];
    left.load_a(a, row, k);
#pragma unroll
    for (int j = 0; j < kRight / 16; ++j) {
      right.load_b(b, 16 * j, k);
      arch::multiply_add<T>(sums[2 * j], a, b[0], b[1]);
      arch::multiply_add<T>(sums[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// sums [16, kD] += weights [16, kRows] rows, the weights rounded to T.
template <class T, int kRows, int kD>
__device__ __forceinline__ void add_weighted(Sums<kD / 8>& sums, const Sums<kRows / 8>& weights,
                                             const Tile<T, kRows, kD>& rows) {
#pragma unroll
  for (int j = 0; j < kRows / 16; ++j) {
    const uint32_t a[4] = {
        pack<T>(weights[2 * j][0], weights[2 * j][1]), pack<T>(weights[2 * j][2], weights[2 * j][3]),
        pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1]), pack<T>(weights[2 * j + 1][2], weights[2 * j + 1][3])};
#pragma unroll
    for (int n = 0; n < kD / 16; ++n) {
      uint32_t b[4];
      rows.load_b_rows(b, 16 * j, n);
      arch::multiply_add<T>(sums[2 * n], a, b[0], b[1]);
      arch::multiply_add<T>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Writes a warp's sums, each row times its factor, to 16 rows of global memory, 16 bytes a lane, by way of the warp's own
// 16 rows of a tile that nobody needs any more.
template <class T, int kRows, int kD, class RowOf>
__device__ __forceinline__ void store_rows(const Sums<kD / 8>& sums, float factor, float factor_below,
                                           Tile<T, kRows, kD>& tile, int row, const RowOf& row_of) {
  const int lane = threadIdx.x % kLanesOfWarp, g = lane / 4, t = lane % 4;
  __syncwarp();  // other lanes may have loaded matrices from here
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
    reinterpret_cast<uint32_t*>(tile.at(row + g, n))[t] = pack<T>(sums[n][0] * factor, sums[n][1] * factor);
    reinterpret_cast<uint32_t*>(tile.at(row + g + 8, n))[t] = pack<T>(sums[n][2] * factor_below, sums[n][3] * factor_below);
  }
  __syncwarp();
  for (int i = lane; i < kWarpRows * (kD / 8); i += kLanesOfWarp) {
    const int r = row + i / (kD / 8), chunk = i % (kD / 8);
    T* to = row_of(r);
    if (to != nullptr) *reinterpret_cast<uint4*>(to + chunk * 8) = *reinterpret_cast<const uint4*>(tile.at(r, chunk));
  }
}

}  // namespace softprompt
