// Divides an attention call into work units and assigns them to threads.
#pragma once

#include <vector>

#include "cpu/attention/problem.h"

namespace softprompt {

// Sizes and index tensors of a call, as given to the op. A pointer is null if its tensor is None.
struct AttentionSizes {
  int64_t batch, queries, keys, prompts, prompt_keys, sequences;
  const int64_t* prompt_index;    // [sequences]
  const int64_t* prompt_lengths;  // [prompts]
  const int64_t* key_lengths;     // [batch]
  const int64_t* cu_seqlens;      // [sequences + 1]
};

struct AttentionPlan {
  std::vector<Sequence> sequences;
  std::vector<SequenceSlice> slices;
  std::vector<WorkUnit> units;
  std::vector<int64_t> thread_units;
  std::vector<SplitGroup> split_groups;  // of the forward only
  int64_t partial_rows = 0;
  // Packed: the tokens that belong to a sequence; those behind them belong to none. Otherwise: the queries.
  int64_t covered_tokens = 0;

  // Makes the problem refer to this plan, which must outlive it, and limits its threads to those that have units.
  void attach(AttentionProblem& problem) const;
};

// Throws std::invalid_argument if an index or length is out of range.
std::vector<Sequence> list_sequences(const AttentionSizes& sizes);

// `split_keys`: if there are too few units for the threads, a unit with a long prompt is split over its prompt keys.
AttentionPlan plan_attention(const AttentionProblem& problem, const AttentionSizes& sizes, bool split_keys);

// Key ranges of a backward plan. Several threads add to the gradients of a `shared` range; its slices and units are
// marked. An `unused` range belongs to no unit, so its gradient is 0.
struct KeyRanges {
  std::vector<SharedRange> shared;
  std::vector<KeyRange> unused;
};
KeyRanges find_prompt_ranges(AttentionPlan& plan, const AttentionProblem& problem, const AttentionSizes& sizes);
KeyRanges find_own_ranges(AttentionPlan& plan, const AttentionProblem& problem, const AttentionSizes& sizes);

}  // namespace softprompt
