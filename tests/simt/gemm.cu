// C [M, N] = A [M, K] B [N, K]^T in bf16 or fp16, with double buffered asynchronous copies, swizzled shared memory,
// ldmatrix and mma. K must be a multiple of kBlockK.
#include "cuda/arch.cuh"
#include "cuda/launch.h"
#include "test_kernels.h"

namespace softprompt {
namespace {

constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 64, kThreads = 128, kChunks = kBlockK / 8;

template <class T>
struct GemmStorage {
  alignas(128) T a[2][kBlockM][kBlockK];
  alignas(128) T b[2][kBlockN][kBlockK];
};

// The column of a row's 16-byte chunk. In 8 consecutive rows, the same chunk is in different banks.
__device__ __forceinline__ int column_of(int row, int chunk) { return (chunk ^ (row & 7)) * 8; }

template <class T>
__device__ __forceinline__ void copy_tile(T (&tile)[kBlockM][kBlockK], const T* matrix, int first_row, int rows,
                                          int depth, int first_column) {
  for (int i = threadIdx.x; i < kBlockM * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool exists = first_row + row < rows;
    const T* from = matrix + (exists ? static_cast<int64_t>(first_row + row) * depth + first_column + chunk * 8 : 0);
    arch::copy_16_async(&tile[row][column_of(row, chunk)], from, exists);
  }
}

template <class T>
__global__ void gemm(const T* a, const T* b, float* c, int rows, int columns, int depth) {
  auto& shared = arch::shared_storage<GemmStorage<T>>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kBlockM, first_column = blockIdx.x * kBlockN;
  const auto copy = [&](int step) {
    copy_tile(shared.a[step % 2], a, first_row, rows, depth, step * kBlockK);
    copy_tile(shared.b[step % 2], b, first_column, columns, depth, step * kBlockK);
    arch::commit_copies();
  };
  float accumulator[kBlockN / 8][4] = {};
  const int steps = depth / kBlockK;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy(step + 1);
      arch::wait_for_copies<1>();
    } else {
      arch::wait_for_copies<0>();
    }
    __syncthreads();
    const auto& tile_a = shared.a[step % 2];
    const auto& tile_b = shared.b[step % 2];
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      uint32_t a_fragment[4];
      const int row = warp * 16 + lane % 16;
      arch::load_matrices(a_fragment, &tile_a[row][column_of(row, 2 * k + lane / 16)]);
#pragma unroll
      for (int j = 0; j < kBlockN / 16; ++j) {
        uint32_t b_fragment[4];
        const int column = j * 16 + lane % 8 + lane / 16 * 8;
        arch::load_matrices(b_fragment, &tile_b[column][column_of(column, 2 * k + lane / 8 % 2)]);
        arch::multiply_add<T>(accumulator[2 * j], a_fragment, b_fragment[0], b_fragment[1]);
        arch::multiply_add<T>(accumulator[2 * j + 1], a_fragment, b_fragment[2], b_fragment[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < kBlockN / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + warp * 16 + lane / 4 + i / 2 * 8;
      const int column = first_column + j * 8 + lane % 4 * 2 + i % 2;
      if (row < rows && column < columns) c[static_cast<int64_t>(row) * columns + column] = accumulator[j][i];
    }
  }
}

}  // namespace

void run_gemm(uintptr_t a, uintptr_t b, uintptr_t c, int rows, int columns, int depth, bool bfloat16) {
  const dim3 grid((columns + kBlockN - 1) / kBlockN, (rows + kBlockM - 1) / kBlockM);
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    launch("gemm", gemm<T>, grid, kThreads, sizeof(GemmStorage<T>), nullptr, reinterpret_cast<const T*>(a),
           reinterpret_cast<const T*>(b), reinterpret_cast<float*>(c), rows, columns, depth);
  };
  bfloat16 ? go(__nv_bfloat16()) : go(__half());
}

}  // namespace softprompt
