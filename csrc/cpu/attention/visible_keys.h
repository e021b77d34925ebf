// Which keys a query sees.
//
// Prompt key p stands at position p, own key j at prompt_length + j: one row of keys, of which the causal rule, a window
// and padding at the end leave each query one run. So a mask is two numbers a query.
#pragma once

#include "cpu/attention/problem.h"
#include "cpu/platform/integers.h"

namespace softprompt {

struct Run {  // of positions [begin, end); empty where end <= begin
  int64_t begin, end;
};

SPK_INLINE Run intersection(const Run& a, const Run& b) { return {most(a.begin, b.begin), least(a.end, b.end)}; }

SPK_INLINE Run visible_run(const AttentionProblem& problem, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.prompt_length + sequence.keys - sequence.queries + query;
  Run run = {0, sequence.prompt_length + sequence.key_length};
  if (problem.causal) run.end = least(run.end, position + 1);
  if (problem.window > 0) run.begin = most(0, position - problem.window + 1);
  return run;
}

// The positions that a unit looks at, for one of its sequences.
SPK_INLINE Run looked_at(const Unit& unit, const Sequence& sequence) {
  return {unit.prompt_begin, unit.own ? sequence.prompt_length + sequence.keys : unit.prompt_end};
}

}  // namespace softprompt
