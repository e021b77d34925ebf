// Which keys a query sees.
//
// Prompt key p is at position p, own key j at position prompt_length + j. Causality, a window and padding at the end
// leave each query one range of consecutive positions. So the mask is two numbers for each query.
#pragma once

#include "cpu/attention/problem.h"
#include "cpu/platform/integers.h"

namespace softprompt {

// Positions [begin, end); empty if end <= begin.
struct PositionRange {
  int64_t begin, end;
};

SPK_INLINE PositionRange intersection(const PositionRange& a, const PositionRange& b) {
  return {max64(a.begin, b.begin), min64(a.end, b.end)};
}

// The positions that a query sees.
SPK_INLINE PositionRange visible_range(const AttentionProblem& problem, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.prompt_length + sequence.keys - sequence.queries + query;
  PositionRange range = {0, sequence.prompt_length + sequence.key_length};
  if (problem.causal) range.end = min64(range.end, position + 1);
  if (problem.window > 0) range.begin = max64(0, position - problem.window + 1);
  return range;
}

// The positions that a unit attends to, for one of its sequences.
SPK_INLINE PositionRange unit_range(const WorkUnit& unit, const Sequence& sequence) {
  return {unit.prompt_begin, unit.own ? sequence.prompt_length + sequence.keys : unit.prompt_end};
}

}  // namespace softprompt
