// The host implementation of csrc/cuda/arch.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace softprompt::simt {

void* shared_memory(size_t bytes);  // of the block. An error if it has fewer bytes
void copy_16(void* shared, const void* global);  // `global` null: writes zeros
void commit();
void wait_for_groups(uint32_t pending);
void load_four_matrices(uint32_t (&out)[4], const void* row, bool transposed);
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16);

}  // namespace softprompt::simt

namespace softprompt::arch {

template <class Storage>
SPK_DEVICE Storage& shared_storage() {
  return *static_cast<Storage*>(simt::shared_memory(sizeof(Storage)));
}

SPK_DEVICE void copy_16_async(void* shared, const void* global, bool exists) {
  simt::copy_16(shared, exists ? global : nullptr);
}

SPK_DEVICE void commit_copies() { simt::commit(); }

template <int kPending>
SPK_DEVICE void wait_for_copies() {
  simt::wait_for_groups(kPending);
}

SPK_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) { simt::load_four_matrices(out, row, false); }
SPK_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  simt::load_four_matrices(out, row, true);
}

template <class T>
SPK_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "mma takes bf16 or fp16");
  simt::multiply_add(d, a, b0, b1, std::is_same_v<T, __nv_bfloat16>);
}

// Exact to fp32. The hardware's result is off by up to 2 units in the last place.
SPK_DEVICE float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace softprompt::arch
