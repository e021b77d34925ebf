// One kernel for each error that csrc/simt finds, and similar kernels that are correct.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/arch.cuh"
#include "cuda/launch.h"
#include "test_kernels.h"

namespace softprompt {
namespace {

constexpr int kThreads = 64;

struct Storage {
  alignas(16) float numbers[kThreads];
};

using Kernel = void(const float* data, float* out);

__global__ void sum(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  float total = data[threadIdx.x];
  for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(0xffffffffu, total, by);
  if (threadIdx.x % 32 == 0) shared.numbers[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = shared.numbers[0] + shared.numbers[1];
}

__global__ void reads_beyond_the_end(const float* data, float* out) { out[threadIdx.x] = data[threadIdx.x + 1]; }

__global__ void reads_before_the_beginning(const float* data, float* out) {
  out[threadIdx.x] = data[static_cast<int>(threadIdx.x) - 1];
}

__global__ void writes_to_an_input(const float* data, float* out) {
  out[threadIdx.x] = 0;
  const_cast<float*>(data)[threadIdx.x] = 1;
}

__global__ void reads_16_bytes_at_an_unaligned_address(const float* data, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(data + 1);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

__global__ void reads_beyond_shared_memory(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x + 1];
}

__global__ void reads_unwritten_shared_memory(const float*, float* out) {
  out[threadIdx.x] = arch::shared_storage<Storage>().numbers[threadIdx.x];
}

__global__ void needs_more_shared_memory(const float*, float* out) {
  struct Large {
    float numbers[10 * kThreads];
  };
  out[threadIdx.x] = reinterpret_cast<uintptr_t>(&arch::shared_storage<Large>()) != 0;
}

__global__ void misses_a_barrier(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  out[threadIdx.x] = shared.numbers[kThreads - 1 - threadIdx.x];
}

__global__ void overwrites_before_others_have_read(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared.numbers[(threadIdx.x + 32) % kThreads];
  shared.numbers[threadIdx.x] = 0;
}

__global__ void misses_a_warp_barrier(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __shfl_xor_sync(0xffffffffu, 0, 1);  // does not order accesses to memory
  out[threadIdx.x] = shared.numbers[threadIdx.x ^ 1];
}

__global__ void has_a_warp_barrier(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = shared.numbers[threadIdx.x ^ 1];
}

__global__ void writes_where_another_block_writes(const float* data, float* out) {
  out[threadIdx.x] = data[threadIdx.x];
}

__global__ void reads_what_another_block_writes(const float*, float* out) {
  if (blockIdx.x == 0) {
    out[threadIdx.x] = 1;
  } else if (out[threadIdx.x] == 1) {
    out[threadIdx.x + kThreads] = 1;
  }
}

__global__ void adds_atomically(const float* data, float* out) { atomicAdd(out, data[threadIdx.x]); }

__global__ void adds_atomically_and_reads(const float* data, float* out) {
  atomicAdd(out, data[threadIdx.x]);
  if (threadIdx.x == 0) out[1 + blockIdx.x] = out[0];
}

__global__ void shuffles_after_a_lane_has_ended(const float* data, float* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}

__global__ void shuffles_while_a_lane_is_at_a_barrier(const float* data, float* out) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
  }
}

__global__ void is_not_in_its_own_mask(const float* data, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, data[threadIdx.x], 1);
}

__global__ void reads_a_copy_without_waiting(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, true);
  arch::commit_copies();
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void waits_for_too_few_copies(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, true);
  arch::commit_copies();
  arch::wait_for_copies<1>();
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void never_commits_a_copy(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, true);
  arch::wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void ends_during_a_copy(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, true);
  arch::commit_copies();
  out[threadIdx.x] = 0;
}

__global__ void shares_a_copy_without_a_barrier(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, true);
  arch::commit_copies();
  arch::wait_for_copies<0>();
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void copies_correctly(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  const bool exists = threadIdx.x < kThreads / 8;
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, exists);
  arch::commit_copies();
  arch::wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void copies_to_an_unaligned_address(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  arch::copy_16_async(&shared.numbers[1], data, true);
  out[threadIdx.x] = 0;
}

__global__ void loads_matrices_from_an_unaligned_address(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  uint32_t four[4];
  arch::load_matrices(four, &shared.numbers[1]);
  out[threadIdx.x] = static_cast<float>(four[0]);
}

__device__ __attribute__((noinline)) float deep(const float* data, int depth) {
  volatile float here[1024];
  here[depth] = data[threadIdx.x];
  return depth == 0 ? here[0] : deep(data, depth - 1) + here[depth];
}

__global__ void overflows_its_stack(const float* data, float* out) { out[threadIdx.x] = deep(data, 1000); }

__global__ void reads_and_updates_in_turn(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncwarp();
  const float next = shared.numbers[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
  __syncwarp();
  shared.numbers[threadIdx.x] += next;
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void reads_again_after_a_warp_barrier(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncwarp();
  float sum = threadIdx.x == 0 ? shared.numbers[1] : 0;
  __syncwarp();
  if (threadIdx.x == 0) sum += shared.numbers[1];
  if (threadIdx.x == 1) shared.numbers[1] = 5;
  out[threadIdx.x] = sum;
}

__global__ void adds_once_and_reads(const float*, float* out) {
  if (threadIdx.x != 0) return;
  atomicAdd(out, 1.0f);
  if (blockIdx.x == 1) out[1] = out[0];
}

__global__ void waits_at_two_barriers(const float* data, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  } else {
    out[threadIdx.x] = 2 * data[threadIdx.x];
    __syncthreads();
  }
}

__global__ void multiplies_at_two_lines(const float* data, float* out) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x % 32 < 16) {
    arch::multiply_add<__half>(d, a, 0, 0);
    out[threadIdx.x] = d[0];
  } else {
    arch::multiply_add<__half>(d, a, 1, 1);
    out[threadIdx.x] = d[1] + data[0];
  }
}

__global__ void loads_with_a_stride(const float* data, float* out) {  // 8 numbers apart: each load has its own sector
  if (threadIdx.x < 8) out[threadIdx.x] = data[8 * threadIdx.x];
}

__global__ void has_bank_conflicts(const float* data, float* out) {  // 8 lanes of a warp read from one bank
  auto& shared = arch::shared_storage<Storage[5]>();
  auto* numbers = &shared[0].numbers[0];
  for (int i = threadIdx.x; i < 5 * kThreads; i += kThreads) numbers[i] = data[i % kThreads];
  __syncthreads();
  if (threadIdx.x < 8) out[threadIdx.x] = numbers[32 * threadIdx.x];
}

struct NamedKernel {
  const char* name;
  Kernel* kernel;
};

#define SPK_KERNEL(name) \
  { #name, name }
constexpr NamedKernel kKernels[] = {
    SPK_KERNEL(sum),
    SPK_KERNEL(reads_beyond_the_end),
    SPK_KERNEL(reads_before_the_beginning),
    SPK_KERNEL(writes_to_an_input),
    SPK_KERNEL(reads_16_bytes_at_an_unaligned_address),
    SPK_KERNEL(reads_beyond_shared_memory),
    SPK_KERNEL(reads_unwritten_shared_memory),
    SPK_KERNEL(needs_more_shared_memory),
    SPK_KERNEL(misses_a_barrier),
    SPK_KERNEL(overwrites_before_others_have_read),
    SPK_KERNEL(misses_a_warp_barrier),
    SPK_KERNEL(has_a_warp_barrier),
    SPK_KERNEL(writes_where_another_block_writes),
    SPK_KERNEL(reads_what_another_block_writes),
    SPK_KERNEL(adds_atomically),
    SPK_KERNEL(adds_atomically_and_reads),
    SPK_KERNEL(shuffles_after_a_lane_has_ended),
    SPK_KERNEL(shuffles_while_a_lane_is_at_a_barrier),
    SPK_KERNEL(is_not_in_its_own_mask),
    SPK_KERNEL(reads_a_copy_without_waiting),
    SPK_KERNEL(waits_for_too_few_copies),
    SPK_KERNEL(never_commits_a_copy),
    SPK_KERNEL(ends_during_a_copy),
    SPK_KERNEL(shares_a_copy_without_a_barrier),
    SPK_KERNEL(copies_correctly),
    SPK_KERNEL(copies_to_an_unaligned_address),
    SPK_KERNEL(loads_matrices_from_an_unaligned_address),
    SPK_KERNEL(overflows_its_stack),
    SPK_KERNEL(reads_and_updates_in_turn),
    SPK_KERNEL(reads_again_after_a_warp_barrier),
    SPK_KERNEL(adds_once_and_reads),
    SPK_KERNEL(waits_at_two_barriers),
    SPK_KERNEL(multiplies_at_two_lines),
    SPK_KERNEL(loads_with_a_stride),
    SPK_KERNEL(has_bank_conflicts),
};

}  // namespace

void run_kernel(const char* name, uintptr_t data, uintptr_t out, int blocks) {
  for (const NamedKernel& each : kKernels) {
    if (std::strcmp(each.name, name) != 0) continue;
    const size_t bytes = std::strcmp(name, "has_bank_conflicts") == 0 ? 5 * sizeof(Storage) : sizeof(Storage);
    launch(name, each.kernel, blocks, kThreads, bytes, nullptr, reinterpret_cast<const float*>(data),
           reinterpret_cast<float*>(out));
    return;
  }
  throw std::invalid_argument(std::string("there is no kernel ") + name);
}

}  // namespace softprompt
