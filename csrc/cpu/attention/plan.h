// How an attention call is cut into units, and which thread works on which.
#pragma once

#include <vector>

#include "cpu/attention/problem.h"

namespace softprompt {

// Sizes and index tensors of a call, as given to the op. Pointers may be null where a tensor is None.
struct AttentionSizes {
  int64_t batch, queries, keys, prompts, prompt_keys, sequences;
  const int64_t* prompt_index;    // [sequences]
  const int64_t* prompt_lengths;  // [prompts]
  const int64_t* key_lengths;     // [batch]
  const int64_t* cu_seqlens;      // [sequences + 1]
};

struct AttentionPlan {
  std::vector<Sequence> sequences;
  std::vector<Piece> pieces;
  std::vector<Unit> units;
  std::vector<int64_t> thread_units;
  std::vector<Merge> merges;  // of forward plans
  int64_t partial_rows = 0;
  int64_t covered_tokens = 0;  // packed: tokens past these belong to no sequence; otherwise the queries of a sequence

  // Points the problem at this plan, which must outlive it, with as many threads as have units.
  void attach(AttentionProblem& problem) const;
};

// Throws std::invalid_argument where an index or length is out of range.
std::vector<Sequence> list_sequences(const AttentionSizes& sizes);

// `split_keys`: where there are fewer units than threads could use, several look at parts of a long prompt.
AttentionPlan plan_attention(const AttentionProblem& problem, const AttentionSizes& sizes, bool split_keys);

// Ranges of keys of a backward plan. `shared` ones have parts in several threads, and their pieces and units are marked;
// `unseen` ones belong to no unit, and their gradient is 0.
struct KeyRanges {
  std::vector<SharedRange> shared;
  std::vector<KeyRange> unseen;
};
KeyRanges find_prompt_ranges(AttentionPlan& plan, const AttentionProblem& problem, const AttentionSizes& sizes);
KeyRanges find_own_ranges(AttentionPlan& plan, const AttentionProblem& problem, const AttentionSizes& sizes);

}  // namespace softprompt
