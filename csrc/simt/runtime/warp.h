// Collective operations of a warp: __shfl*_sync, votes, __syncwarp.
//
// The last lane that arrives computes the results of all, so each lane waits once. A function's return address tells
// its place in the kernel's code, so kernels must call it directly: all wrappers are inlined.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/runtime/grid.h"

namespace softprompt::simt {

enum Operation {
  kVote,
  kSyncWarp,
  kShuffle,  // + the kind of shuffle
  kLoadMatrices = kAligned,
  kLoadMatricesTransposed,
  kMmaBfloat16,
  kMmaFloat16,
};

// How a lane's source is computed. A lane whose source is outside its segment of `width` lanes gets its own value.
enum class Shuffle { index, up, down, exclusive_or };

// The `bits` of another lane: a value of up to 8 bytes.
uint64_t shuffle(Shuffle kind, LaneMask mask, uint64_t bits, int operand, int width);

// The lanes whose predicate holds.
LaneMask ballot(LaneMask mask, bool predicate);

void sync_warp(LaneMask mask);

template <class T>
inline __attribute__((always_inline)) T shuffle_value(Shuffle kind, LaneMask mask, T value, int operand, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles are of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace softprompt::simt
