// Operations of a warp as meetings of its lanes: __shfl*_sync, votes, __syncwarp.
//
// The last lane to come computes for all, so each lane waits once. Functions are places in the kernel's code by where they
// return to, and so must be called from there: what wraps them is inlined.
#pragma once

#include <cstdint>
#include <cstring>

#include "simt/runtime/grid.h"

namespace softprompt::simt {

enum Operation {
  kVote,
  kSyncWarp,
  kShuffle,  // and as many as there are kinds
  kLoadMatrices = kAligned,
  kLoadMatricesTransposed,
  kProductBfloat16,
  kProductFloat16,
};

// The lane that each lane reads from; lanes outside of a segment of `width` read their own.
enum class Shuffle { index, up, down, exclusive_or };

// `bits` of a value of 4 or 8 bytes from another lane.
uint64_t shuffle(Shuffle kind, Lanes mask, uint64_t bits, int operand, int width);

// The lanes whose predicate holds.
Lanes ballot(Lanes mask, bool predicate);

void sync_warp(Lanes mask);

template <class T>
inline __attribute__((always_inline)) T shuffle_value(Shuffle kind, Lanes mask, T value, int operand, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles are of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace softprompt::simt
