// Tiles of 16-bit rows in shared memory, and their fragments in registers.
//
// A row of D numbers is D / 8 chunks of 16 bytes. The chunks are swizzled, so that each of the 8 groups of banks is
// used once both by a copy (neighbouring chunks of one row) and by ldmatrix (the same chunk of 8 rows). The swizzle is
// chunk ^ (row & 7) where a row is a multiple of 128 bytes. For D = 96, whose rows begin 64 bytes apart modulo 128, it
// is chunk ^ (row / 2 & 3).
#pragma once

#include "cuda/arch.cuh"

namespace softprompt {

constexpr int kWarps = 4, kAttentionThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;  // rows of a tile that one warp computes
constexpr int kBlockRows = kWarps * kWarpRows;

template <class T, int kRows, int kD>
struct alignas(128) Tile {
  static constexpr int kChunks = kD / 8;
  T numbers[kRows * kD];

  __device__ __forceinline__ static int offset(int row, int chunk) {
    const int swizzled = kD % 64 == 0 ? chunk ^ (row & 7) : chunk ^ (row / 2 & 3);
    return row * kD + swizzled * 8;
  }
  __device__ __forceinline__ T* at(int row, int chunk) { return numbers + offset(row, chunk); }
  __device__ __forceinline__ const T* at(int row, int chunk) const { return numbers + offset(row, chunk); }

  // Starts asynchronous copies of all rows. `source_of(row)` is the address of a row in global memory, or nullptr for a
  // row of zeros.
  template <class SourceOf>
  __device__ __forceinline__ void copy_async(const SourceOf& source_of) {
    for (int i = threadIdx.x; i < kRows * kChunks; i += kAttentionThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const T* from = source_of(row);
      arch::copy_16_async(at(row, chunk), from + chunk * 8, from != nullptr);
    }
  }

  // Fragment of A [16, 16]: rows from `row`, columns from 16 k.
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int row, int k) const {
    const int lane = threadIdx.x % kWarpSize;
    arch::load_matrices(a, at(row + lane % 16, 2 * k + lane / 16));
  }

  // Fragments of B [16, 16], the transpose of rows from `row` and columns from 16 k. b[0] and b[1] hold its first 8
  // columns.
  __device__ __forceinline__ void load_b(uint32_t (&b)[4], int row, int k) const {
    const int lane = threadIdx.x % kWarpSize;
    arch::load_matrices(b, at(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  }

  // Fragments of B [16, 16]: rows from `row`, columns from 16 n. b[0] and b[1] hold its first 8 columns.
  __device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], int row, int n) const {
    const int lane = threadIdx.x % kWarpSize;
    arch::load_matrices_transposed(b, at(row + lane % 16, 2 * n + lane / 16));
  }
};

// Calls work(index, stage) for tiles 0 to count - 1, double buffered: the next tile is copied to the other stage
// meanwhile. `copy(index, stage)` starts a tile's copies and commits them as one group. The caller has already called
// it for the first tile.
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
    __syncthreads();  // all threads have read this stage before the next copy overwrites it
  }
}

// A warp's fp32 accumulator [16, 8 kTiles]: lane 4 g + t has columns 8 j + 2 t and 8 j + 2 t + 1 of rows g and g + 8.
template <int kTiles>
using Accumulator = float[kTiles][4];

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

// accumulator [16, kRowsB] += A B^T. A [16, kD] is 16 rows of `a_tile` from `row`; B is all of `b_tile`.
template <class T, int kRowsA, int kRowsB, int kD>
__device__ __forceinline__ void gemm_abt(Accumulator<kRowsB / 8>& accumulator, const Tile<T, kRowsA, kD>& a_tile,
                                         int row, const Tile<T, kRowsB, kD>& b_tile) {
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[4], b[4];
    a_tile.load_a(a, row, k);
#pragma unroll
    for (int j = 0; j < kRowsB / 16; ++j) {
      b_tile.load_b(b, 16 * j, k);
      arch::multiply_add<T>(accumulator[2 * j], a, b[0], b[1]);
      arch::multiply_add<T>(accumulator[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// accumulator [16, kD] += A B. A [16, kRows] is in registers and is rounded to T; B is all of `b_tile`.
template <class T, int kRows, int kD>
__device__ __forceinline__ void gemm_ab(Accumulator<kD / 8>& accumulator, const Accumulator<kRows / 8>& weights,
                                        const Tile<T, kRows, kD>& b_tile) {
#pragma unroll
  for (int j = 0; j < kRows / 16; ++j) {
    const uint32_t a[4] = {
        pack<T>(weights[2 * j][0], weights[2 * j][1]), pack<T>(weights[2 * j][2], weights[2 * j][3]),
        pack<T>(weights[2 * j + 1][0], weights[2 * j + 1][1]), pack<T>(weights[2 * j + 1][2], weights[2 * j + 1][3])};
#pragma unroll
    for (int n = 0; n < kD / 16; ++n) {
      uint32_t b[4];
      b_tile.load_b_rows(b, 16 * j, n);
      arch::multiply_add<T>(accumulator[2 * n], a, b[0], b[1]);
      arch::multiply_add<T>(accumulator[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Writes a warp's accumulator to 16 rows of global memory, 16 bytes a lane. Rows g are multiplied by `factor`, rows g
// + 8 by `lower_factor`. The values pass through the warp's own 16 rows of a tile whose contents are no longer needed.
template <class T, int kRows, int kD, class RowOf>
__device__ __forceinline__ void store_rows(const Accumulator<kD / 8>& accumulator, float factor, float lower_factor,
                                           Tile<T, kRows, kD>& tile, int row, const RowOf& row_of) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  __syncwarp();  // other lanes may have loaded matrices from here
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
    reinterpret_cast<uint32_t*>(tile.at(row + g, n))[t] =
        pack<T>(accumulator[n][0] * factor, accumulator[n][1] * factor);
    reinterpret_cast<uint32_t*>(tile.at(row + g + 8, n))[t] =
        pack<T>(accumulator[n][2] * lower_factor, accumulator[n][3] * lower_factor);
  }
  __syncwarp();
  for (int i = lane; i < kWarpRows * (kD / 8); i += kWarpSize) {
    const int r = row + i / (kD / 8), chunk = i % (kD / 8);
    T* to = row_of(r);
    if (to != nullptr) *reinterpret_cast<uint4*>(to + chunk * 8) = *reinterpret_cast<const uint4*>(tile.at(r, chunk));
  }
}

}  // namespace softprompt
