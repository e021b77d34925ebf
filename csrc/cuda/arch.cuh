// The instructions that CUDA C++ has no function for. This is the only file with PTX. It needs sm_80 or newer.
//
// `csrc/simt/arch.h` has a host implementation of each function here, under the same name. `SPK_SIMT` selects it.
//
// The fragments of an mma.m16n8k16 lie in the registers of a warp as the PTX manual says ("Matrix Fragments for
// mma.m16n8k16"). With lane = 4 g + t, and two 16-bit numbers in a register, the lower column in the lower half:
//
//     A [16, 16]   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)
//     B [16, 8]    b[0] (2t, g)  b[1] (2t + 8, g), the pair in one column
//     C, D [16, 8] d[0] (g, 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1), in fp32
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace softprompt {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace softprompt

#ifdef SPK_SIMT

#include "simt/arch.h"

#else

namespace softprompt::arch {

// The block's dynamic shared memory as one struct. The launch must ask for sizeof(Storage) bytes.
template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Storage*>(dynamic_shared_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts an asynchronous copy of 16 bytes from global to shared memory that bypasses the L1 cache. If `exists` is
// false, nothing is read and 16 zeros are written. Both addresses must be multiples of 16. The destination may be read
// after `wait_for_copies` and a barrier.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Closes a group: all copies that this thread has started since its last group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending latest groups of this thread are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers. Lane 8 i + r passes the address of row r of matrix i: 16 bytes, at a
// multiple of 16. Lane 4 g + t receives columns 2t and 2t + 1 of row g of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed: lane 4 g + t receives rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for bf16 or fp16 inputs, accumulated in fp32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "mma takes bf16 or fp16");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x, to 2 units in the last place. exp2(-inf) = 0. Subnormal results are flushed to 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace softprompt::arch

#endif
