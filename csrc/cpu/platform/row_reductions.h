// Passes over rows of fp32 numbers, with sums that stay accurate over rows of 250,000 elements.
#pragma once

#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

// So many elements are summed in fp32, one sum for each lane, before the result is added to a sum in double.
constexpr int64_t kSumBlock = 4096;

// The first `count` lanes; -inf in the others.
SPK_INLINE Vec load_padded(const float* p, int count) {
  return select(lane_index() < count, load_part(p, count), splat(-kInfinity));
}

// Stores the first `count` lanes.
template <class T>
SPK_INLINE void store_n(T* p, Vec x, int count) {
  if (count == kLanes) {
    store(p, x);
  } else {
    store_part(p, x, count);
  }
}

// Calls body(i, vector at p + i, count) for the elements from `begin` to `end`. `count` is the number of lanes that
// hold elements, less than kLanes for a partial last vector. Its other lanes are -inf, a logit of probability 0.
template <class Body>
SPK_INLINE void for_each_vector(const float* p, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, load(p + i), kLanes);
  if (i < end) body(i, load_padded(p + i, static_cast<int>(end - i)), static_cast<int>(end - i));
}

// The same over two rows: body(i, vector at p + i, vector at q + i, count).
template <class Body>
SPK_INLINE void for_each_vector(const float* p, const float* q, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, load(p + i), load(q + i), kLanes);
  if (i < end) {
    const int count = static_cast<int>(end - i);
    body(i, load_padded(p + i, count), load_padded(q + i, count), count);
  }
}

// The row that the next pass reads. Prefetching it during this pass keeps memory and arithmetic busy at the same time.
struct PrefetchRow {
  const char* data;
  int64_t element_bytes;
};

// Prefetches the cache line of element i.
SPK_INLINE void prefetch(const PrefetchRow& row, int64_t i) {
  __builtin_prefetch(row.data + i * row.element_bytes, 0, 2);
}

// Calls block(begin, end) for each block of [0, count) that is short enough to be summed in fp32.
template <class Block>
SPK_INLINE void sum_blocks(int64_t count, Block block) {
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    block(begin, begin + kSumBlock < count ? begin + kSumBlock : count);
  }
}

SPK_INLINE bool any_lane(IntVec mask) { return max_lanes(select(mask, splat(1.0f), Vec{})) > 0.0f; }

// The largest element; -inf for an empty row. NaN is skipped.
SPK_INLINE float row_max(const float* p, int64_t count) {
  Vec largest = splat(-kInfinity);
  for_each_vector(p, 0, count, [&](int64_t, Vec x, int) __attribute__((always_inline)) { largest = max(x, largest); });
  return max_lanes(largest);
}

// Turns the row of a GEMM's result into logits, in place: adds scale * bias, then applies the softcap.
SPK_INLINE void finish_logits(float* row, const float* bias, float scale, int64_t vocab, float softcap) {
  if (bias != nullptr) {
    for_each_vector(row, bias, 0, vocab, [&](int64_t i, Vec z, Vec b, int count) __attribute__((always_inline)) {
      store_n(row + i, z + scale * b, count);
    });
  }
  if (softcap > 0) {
    for_each_vector(row, 0, vocab, [&](int64_t i, Vec z, int count) __attribute__((always_inline)) {
      store_n(row + i, softcap * tanh(z), count);
    });
  }
}

// The rows [begin, end) out of `count` that a thread works on.
struct ThreadRange {
  int64_t begin, end;
};
SPK_INLINE ThreadRange thread_range(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace softprompt::SPK_ISA
