// Which query sees which key: positions, the ranges of queries and keys that a tile concerns, and scores.
//
// Prompt key p is at position p, own key j at L + j, query i at L + (N - M) + i, where L is the length of the
// sequence's prompt. A query sees a key that exists, is not after it (causal), and is less than `window` before it.
//
// Positions and row numbers of a sequence fit in 32 bits, and so does the sum of two of them. Memory offsets do not.
#pragma once

#include "cuda/arch.cuh"
#include "cuda/attention/problem.h"
#include "cuda/elementwise.cuh"

namespace softprompt {

constexpr float kLn2 = 0.6931471805599453f;

// The sizes of one sequence.
struct Sequence {
  int batch, prompt;
  int prompt_length, key_length;  // keys that exist
  int offset;                     // position of query 0

  __device__ __forceinline__ static int prompt_of(const AttentionProblem& problem, int batch) {
    return problem.prompt_index != nullptr ? static_cast<int>(problem.prompt_index[batch])
                                           : problem.prompts == 1 ? 0 : batch;
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

// Prompt keys or own keys of a sequence: key i is at position first_position + i.
struct KeySegment {
  int first_position, count;
};

struct Range {
  int begin, end;
};

// The keys that at least one query at positions [first, last] sees.
__device__ __forceinline__ Range visible_keys(const AttentionProblem& problem, const KeySegment& keys, int first,
                                              int last) {
  Range range = {0, keys.count};
  if (problem.causal) range.end = min(range.end, last + 1 - keys.first_position);
  if (problem.window != 0) range.begin = max(range.begin, first - problem.window + 1 - keys.first_position);
  return range;
}

// The queries that see at least one key at positions [first, last]. Both ends are within [0, M].
__device__ __forceinline__ Range queries_that_see(const AttentionProblem& problem, const Sequence& sequence, int first,
                                                  int last) {
  Range range = {0, problem.queries};
  if (problem.causal) range.begin = min(max(0, first - sequence.offset), problem.queries);
  if (problem.window != 0) range.end = max(0, min(problem.queries, last - sequence.offset + problem.window));
  return range;
}

// Whether every query at positions [first, last] sees every key at positions [first_key, last_key] that exists.
__device__ __forceinline__ bool all_visible(const AttentionProblem& problem, int first, int last, int first_key,
                                            int last_key) {
  return (!problem.causal || last_key <= first) && (problem.window == 0 || last - first_key < problem.window);
}

// Whether the query at one position sees the key at another.
__device__ __forceinline__ bool is_visible(const AttentionProblem& problem, int query, int key) {
  return (!problem.causal || key <= query) && (problem.window == 0 || query - key < problem.window);
}

// Scale and softcap. Scores are in units of log 2, which exp2 takes.
struct Scoring {
  float factor, softcap, inverse_softcap;

  __device__ __forceinline__ explicit Scoring(const AttentionProblem& problem)
      : factor(problem.softcap == 0 ? problem.scale * kLog2e : problem.scale / problem.softcap),
        softcap(problem.softcap * kLog2e),
        inverse_softcap(problem.softcap == 0 ? 0.0f : 1.0f / (problem.softcap * kLog2e)) {}

  // The score of a query and a key, from their dot product.
  __device__ __forceinline__ float score(float dot) const {
    return softcap == 0 ? dot * factor : softcap * tanhf(dot * factor);
  }

  // d score / d (scale * dot product). 0 for a score of -inf.
  __device__ __forceinline__ float slope(float score) const {
    if (softcap == 0) return 1.0f;
    const float tanh = score * inverse_softcap;
    return score == -kInfinity ? 0.0f : 1.0f - tanh * tanh;
  }
};

}  // namespace softprompt
