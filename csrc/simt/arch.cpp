// Asynchronous copies and matrix operations, as in the PTX ISA manual: "Data Movement and Conversion Instructions:
// cp.async", "Warp Level Matrix Instructions: ldmatrix, mma.sync".
#include "simt/arch.h"

#include <cstring>

#include "simt/checks/counters.h"
#include "simt/checks/error.h"
#include "simt/checks/memory.h"

namespace softprompt::simt {
namespace {

struct MatrixLoad {
  uint32_t* out;
  const void* row;
  const void* place;
};

// Reads the 8 rows of 8 numbers of each of the four matrices.
void gather(void** arguments, uint16_t (&numbers)[4][8][8]) {
  void* rows[kLanes];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const auto& call = *static_cast<MatrixLoad*>(arguments[lane]);
    rows[lane] = const_cast<void*>(call.row);
    std::memcpy(numbers[lane / 8][lane % 8], call.row, 16);
  }
  count_matrix_load(rows, kLanes);
}

template <bool kTransposed>
void load(void** arguments, LaneMask) {
  uint16_t numbers[4][8][8];
  gather(arguments, numbers);
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint16_t low = kTransposed ? numbers[i][2 * t][g] : numbers[i][g][2 * t];
      const uint16_t high = kTransposed ? numbers[i][2 * t + 1][g] : numbers[i][g][2 * t + 1];
      static_cast<MatrixLoad*>(arguments[lane])->out[i] = low | uint32_t{high} << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// The order in which the hardware adds is not documented. Here the sum is computed in double and rounded once.
template <bool kBfloat16>
void multiply(void** arguments, LaneMask) {
  const auto widen = [](uint32_t half) {
    return kBfloat16 ? from_bfloat16(static_cast<uint16_t>(half)) : from_float16(static_cast<uint16_t>(half));
  };
  float a[16][16], b[16][8];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const auto& call = *static_cast<Mma*>(arguments[lane]);
    const uint32_t g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + (i & 1) * 8][2 * t + (i >> 1) * 8];
      to[0] = widen(call.a[i] & 0xffff);
      to[1] = widen(call.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = widen(call.b[i] & 0xffff);
      b[2 * t + 8 * i + 1][g] = widen(call.b[i] >> 16);
    }
  }
  double sums[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sums[i][j] += double{a[i][k]} * double{b[k][j]};
    }
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<Mma*>(arguments[lane])->d;
    const uint32_t g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      d[i] = static_cast<float>(double{d[i]} + sums[g + (i >> 1) * 8][2 * t + (i & 1)]);
    }
  }
  count_mma();
}

constexpr LaneMask kAll = ~LaneMask{0};

}  // namespace

void* shared_memory(size_t bytes) {
  const void* place = __builtin_return_address(0);
  if (bytes > block().shared_bytes) {
    fail(place, "the kernel uses %zu bytes of shared memory and was given %zu", bytes, block().shared_bytes);
  }
  return block().shared;
}

void copy_16(void* shared, const void* global) {
  const void* place = __builtin_return_address(0);
  if (!is_shared(shared)) fail(place, "an asynchronous copy to %p, which is not shared memory", shared);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
    fail(place, "an asynchronous copy of 16 bytes from %p to %p, which are not both multiples of 16", global, shared);
  }
  if (global != nullptr && is_shared(global)) fail(place, "an asynchronous copy from shared memory");
  if (global != nullptr) check_access(global, 16, Access::read, place);
  issue_copy(shared, place);
  count_copy(shared, place);
  std::memset(shared, 0xff, 16);
  Thread& self = thread();
  self.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), self.groups, place});
}

void commit() { ++thread().groups; }

void wait_for_groups(uint32_t pending) {
  Thread& self = thread();
  size_t left = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group + pending >= self.groups) {  // its group may be unfinished, or is not committed yet
      self.copies[left++] = copy;
      continue;
    }
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, 16);
    } else {
      std::memcpy(copy.to, copy.from, 16);
    }
    complete_copy(copy.to);
  }
  self.copies.resize(left);
}

void load_four_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  const void* place = __builtin_return_address(0);
  if (!is_shared(row)) fail(place, "ldmatrix of %p, which is not shared memory", row);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(place, "ldmatrix of %p, which is not a multiple of 16", row);
  check_access(row, 16, Access::read, place);
  MatrixLoad call = {out, row, place};
  if (transposed) {
    run_collective(kLoadMatricesTransposed, kAll, &call, load<true>, place);
  } else {
    run_collective(kLoadMatrices, kAll, &call, load<false>, place);
  }
}

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bfloat16) {
  Mma call = {d, a, {b0, b1}};
  const void* place = __builtin_return_address(0);
  if (bfloat16) {
    run_collective(kMmaBfloat16, kAll, &call, multiply<true>, place);
  } else {
    run_collective(kMmaFloat16, kAll, &call, multiply<false>, place);
  }
}

}  // namespace softprompt::simt
