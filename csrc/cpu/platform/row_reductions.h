// Sweeps over rows of fp32 numbers, and sums that stay good over a quarter of a million of them.
#pragma once

#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

// Elements whose sums are kept in fp32, lane by lane, before they are added to a sum in double.
constexpr int64_t kSumBlock = 4096;

SPK_INLINE Vec load_padded(const float* p, int count) {  // the first `count` lanes, -inf in the others
  return select(lane_index() < count, load_part(p, count), splat(-kInfinity));
}

template <class T>
SPK_INLINE void put(T* p, Vec x, int count) {
  if (count == kLanes) {
    store(p, x);
  } else {
    store_part(p, x, count);
  }
}

// body(i, vector at p + i, count) from begin to end. The last vector may have fewer than kLanes lanes; the lanes after
// them are -inf, a logit of probability 0.
template <class Body>
SPK_INLINE void sweep(const float* p, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, load(p + i), kLanes);
  if (i < end) body(i, load_padded(p + i, static_cast<int>(end - i)), static_cast<int>(end - i));
}

// The same over two rows: body(i, vector at p + i, vector at q + i, count).
template <class Body>
SPK_INLINE void sweep(const float* p, const float* q, int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, load(p + i), load(q + i), kLanes);
  if (i < end) {
    const int count = static_cast<int>(end - i);
    body(i, load_padded(p + i, count), load_padded(q + i, count), count);
  }
}

// A row that will be swept over next. It is fetched while this one is computed on, so that memory and arithmetic are
// busy at the same time.
struct Ahead {
  const char* row;
  int64_t element;  // bytes
};
SPK_INLINE void fetch(const Ahead& ahead, int64_t i) {  // where element i is
  __builtin_prefetch(ahead.row + i * ahead.element, 0, 2);
}

// Calls block(begin, end) for the blocks of [0, count) within which sums may stay in fp32.
template <class Block>
SPK_INLINE void sum_blocks(int64_t count, Block block) {
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    block(begin, begin + kSumBlock < count ? begin + kSumBlock : count);
  }
}

SPK_INLINE bool any(IntVec mask) { return max_lanes(select(mask, splat(1.0f), Vec{})) > 0.0f; }

// The largest number, -inf of none; NaN is passed over.
SPK_INLINE float largest_of(const float* p, int64_t count) {
  Vec largest = splat(-kInfinity);
  sweep(p, 0, count, [&](int64_t, Vec x, int) __attribute__((always_inline)) { largest = max(x, largest); });
  return max_lanes(largest);
}

// Products become logits: plus scale * bias, capped.
SPK_INLINE void finish_logits(float* row, const float* bias, float scale, int64_t vocab, float softcap) {
  if (bias != nullptr) {
    sweep(row, bias, 0, vocab, [&](int64_t i, Vec z, Vec b, int count) __attribute__((always_inline)) {
      put(row + i, z + scale * b, count);
    });
  }
  if (softcap > 0) {
    sweep(row, 0, vocab,
          [&](int64_t i, Vec z, int count) __attribute__((always_inline)) { put(row + i, softcap * tanh(z), count); });
  }
}

// The part of `count` rows that a thread works on.
struct Share {
  int64_t begin, end;
};
SPK_INLINE Share share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace softprompt::SPK_ISA
