// One kernel for each thing that csrc/simt says is wrong, and some that look alike and are right.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/arch.cuh"
#include "cuda/launch.h"
#include "simt_toys.h"

namespace softprompt {
namespace {

constexpr int kThreads = 64;

struct Storage {
  alignas(16) float numbers[kThreads];
};

using Toy = void(const float* data, float* out);

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

__global__ void reads_16_bytes_from_an_odd_place(const float* data, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(data + 1);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

__global__ void reads_beyond_shared_memory(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x + 1];
}

__global__ void reads_what_nobody_wrote(const float*, float* out) {
  out[threadIdx.x] = arch::shared_storage<Storage>().numbers[threadIdx.x];
}

__global__ void needs_more_shared_memory(const float*, float* out) {
  struct Large {
    float numbers[10 * kThreads];
  };
  out[threadIdx.x] = reinterpret_cast<uintptr_t>(&arch::shared_storage<Large>()) != 0;
}

__global__ void forgets_a_barrier(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  out[threadIdx.x] = shared.numbers[kThreads - 1 - threadIdx.x];
}

__global__ void overwrites_what_others_may_still_read(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared.numbers[(threadIdx.x + 32) % kThreads];
  shared.numbers[threadIdx.x] = 0;
}

__global__ void forgets_a_barrier_of_the_warp(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __shfl_xor_sync(0xffffffffu, 0, 1);  // orders nothing in memory
  out[threadIdx.x] = shared.numbers[threadIdx.x ^ 1];
}

__global__ void has_a_barrier_of_the_warp(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  shared.numbers[threadIdx.x] = data[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = shared.numbers[threadIdx.x ^ 1];
}

__global__ void writes_where_another_block_does(const float* data, float* out) { out[threadIdx.x] = data[threadIdx.x]; }

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

__global__ void leaves_lanes_behind(const float* data, float* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}

__global__ void waits_at_two_places(const float* data, float* out) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
  }
}

__global__ void is_not_in_its_own_mask(const float* data, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, data[threadIdx.x], 1);
}

__global__ void reads_a_copy_before_it_lands(const float* data, float* out) {
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

__global__ void leaves_with_a_copy_on_its_way(const float* data, float* out) {
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

__global__ void copies_as_it_should(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  const bool exists = threadIdx.x < kThreads / 8;
  if (threadIdx.x < kThreads / 4) arch::copy_16_async(&shared.numbers[4 * threadIdx.x], data + 4 * threadIdx.x, exists);
  arch::commit_copies();
  arch::wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = shared.numbers[threadIdx.x];
}

__global__ void copies_to_an_odd_place(const float* data, float* out) {
  auto& shared = arch::shared_storage<Storage>();
  arch::copy_16_async(&shared.numbers[1], data, true);
  out[threadIdx.x] = 0;
}

__global__ void loads_matrices_from_an_odd_place(const float* data, float* out) {
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

__global__ void reads_again_after_a_barrier_of_the_warp(const float* data, float* out) {
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

__global__ void multiplies_at_two_places(const float* data, float* out) {
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

__global__ void strides(const float* data, float* out) {  // 8 numbers apart: a sector each
  if (threadIdx.x < 8) out[threadIdx.x] = data[8 * threadIdx.x];
}

__global__ void conflicts(const float* data, float* out) {  // 8 lanes of each warp in one bank
  auto& shared = arch::shared_storage<Storage[5]>();
  auto* numbers = &shared[0].numbers[0];
  for (int i = threadIdx.x; i < 5 * kThreads; i += kThreads) numbers[i] = data[i % kThreads];
  __syncthreads();
  if (threadIdx.x < 8) out[threadIdx.x] = numbers[32 * threadIdx.x];
}

struct Named {
  const char* name;
  Toy* toy;
};

#define SPK_TOY(name) \
  { #name, name }
constexpr Named kToys[] = {
    SPK_TOY(sum),
    SPK_TOY(reads_beyond_the_end),
    SPK_TOY(reads_before_the_beginning),
    SPK_TOY(writes_to_an_input),
    SPK_TOY(reads_16_bytes_from_an_odd_place),
    SPK_TOY(reads_beyond_shared_memory),
    SPK_TOY(reads_what_nobody_wrote),
    SPK_TOY(needs_more_shared_memory),
    SPK_TOY(forgets_a_barrier),
    SPK_TOY(overwrites_what_others_may_still_read),
    SPK_TOY(forgets_a_barrier_of_the_warp),
    SPK_TOY(has_a_barrier_of_the_warp),
    SPK_TOY(writes_where_another_block_does),
    SPK_TOY(reads_what_another_block_writes),
    SPK_TOY(adds_atomically),
    SPK_TOY(adds_atomically_and_reads),
    SPK_TOY(leaves_lanes_behind),
    SPK_TOY(waits_at_two_places),
    SPK_TOY(is_not_in_its_own_mask),
    SPK_TOY(reads_a_copy_before_it_lands),
    SPK_TOY(waits_for_too_few_copies),
    SPK_TOY(never_commits_a_copy),
    SPK_TOY(leaves_with_a_copy_on_its_way),
    SPK_TOY(shares_a_copy_without_a_barrier),
    SPK_TOY(copies_as_it_should),
    SPK_TOY(copies_to_an_odd_place),
    SPK_TOY(loads_matrices_from_an_odd_place),
    SPK_TOY(overflows_its_stack),
    SPK_TOY(reads_and_updates_in_turn),
    SPK_TOY(reads_again_after_a_barrier_of_the_warp),
    SPK_TOY(adds_once_and_reads),
    SPK_TOY(waits_at_two_barriers),
    SPK_TOY(multiplies_at_two_places),
    SPK_TOY(strides),
    SPK_TOY(conflicts),
};

}  // namespace

void run_toy(const char* what, uintptr_t data, uintptr_t out, int blocks) {
  for (const Named& each : kToys) {
    if (std::strcmp(each.name, what) != 0) continue;
    const size_t bytes = std::strcmp(what, "conflicts") == 0 ? 5 * sizeof(Storage) : sizeof(Storage);
    launch(what, each.toy, blocks, kThreads, bytes, nullptr, reinterpret_cast<const float*>(data),
           reinterpret_cast<float*>(out));
    return;
  }
  throw std::invalid_argument(std::string("there is no toy ") + what);
}

}  // namespace softprompt
