// Who sees whom: positions of queries and keys, ranges of them that a tile concerns, and scores of pairs.
//
// Prompt key p stands at position p, own key j at L + j, query i at L + (N - M) + i, with L the length of the sequence's
// prompt. A query sees a key that exists, is not after it (causal), and is less than `window` before it.
//
// Positions and rows of a sequence fit 32 bits, with room to add two of them; offsets in memory do not.
#pragma once

#include <limits>

#include "cuda/arch.cuh"
#include "cuda/attention/problem.h"

namespace softprompt {

constexpr float kLog2OfE = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNowhere = std::numeric_limits<float>::infinity();

// One sequence's sizes.
struct Sequence {
  int batch, prompt;
  int prompt_length, key_length;  // keys that exist
  int offset;                     // position of query 0

  __device__ __forceinline__ static int prompt_of(const AttentionProblem& problem, int batch) {
    return problem.prompt_index != nullptr ? static_cast<int>(problem.prompt_index[batch]) : problem.prompts == 1 ? 0 : batch;
  }

  __device__ __forceinline__ static int length_of(const AttentionProblem& problem, int prompt) {
    const int64_t keys = problem.prompt_keys;
    return static_cast<int>(problem.prompt_lengths != nullptr ? min(problem.prompt_lengths[prompt], keys) : keys);
  }

  __device__ __forceinline__ Sequence(const AttentionProblem& problem, int batch_)
      : batch(batch_),
        prompt(prompt_of(problem, batch_)),
        prompt_length(length_of(problem, prompt)),
        key_length(problem.key_lengths != nullptr ? static_cast<int>(problem.key_lengths[batch_]) : problem.keys),
        offset(prompt_length + problem.keys - problem.queries) {}
};

// Keys of a prompt or own ones: key i stands at position first + i.
struct Keys {
  int first, count;
};

struct Range {
  int begin, end;
};

// The keys that some of the queries at positions [first, last] see.
__device__ __forceinline__ Range keys_seen(const AttentionProblem& problem, const Keys& keys, int first, int last) {
  Range range = {0, keys.count};
  if (problem.causal) range.end = min(range.end, last + 1 - keys.first);
  if (problem.window != 0) range.begin = max(range.begin, first - problem.window + 1 - keys.first);
  return range;
}

// The queries that see some of the keys at positions [first, last]; within [0, M], so that rows can be counted from them.
__device__ __forceinline__ Range queries_seeing(const AttentionProblem& problem, const Sequence& sequence, int first,
                                                int last) {
  Range range = {0, problem.queries};
  if (problem.causal) range.begin = min(max(0, first - sequence.offset), problem.queries);
  if (problem.window != 0) range.end = max(0, min(problem.queries, last - sequence.offset + problem.window));
  return range;
}

// Whether every query at positions [first, last] sees every key at positions [first_key, last_key], if it exists.
__device__ __forceinline__ bool all_seen(const AttentionProblem& problem, int first, int last, int first_key,
                                         int last_key) {
  return (!problem.causal || last_key <= first) && (problem.window == 0 || last - first_key < problem.window);
}

__device__ __forceinline__ bool sees(const AttentionProblem& problem, int query, int key) {
  return (!problem.causal || key <= query) && (problem.window == 0 || query - key < problem.window);
}

// Scores in units of log 2: what exp2 takes.
struct Scoring {
  float factor, softcap, per_softcap;

  __device__ __forceinline__ explicit Scoring(const AttentionProblem& problem)
      : factor(problem.softcap == 0 ? problem.scale * kLog2OfE : problem.scale / problem.softcap),
        softcap(problem.softcap * kLog2OfE),
        per_softcap(problem.softcap == 0 ? 0.0f : 1.0f / (problem.softcap * kLog2OfE)) {}

  // Of a product of query and key.
  __device__ __forceinline__ float score(float product) const {
    return softcap == 0 ? product * factor : softcap * tanhf(product * factor);
  }

  // What the scaled product's gradient is, of the score's; 0 for a score of -inf.
  __device__ __forceinline__ float slope(float score) const {
    if (softcap == 0) return 1.0f;
    const float tanh = score * per_softcap;
    return score == -kNowhere ? 0.0f : 1.0f - tanh * tanh;
  }
};

}  // namespace softprompt
