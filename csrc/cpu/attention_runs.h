// Which keys a query sees.
//
// Whatever hides a key (the causal rule, a window, padding, a prompt's length) leaves each query one run of prompt keys
// and one run of own keys. So a mask is two numbers a row and segment.
#pragma once

#include "attention.h"

#define SPK_INLINE static inline __attribute__((always_inline))

namespace softprompt {

struct Run {  // keys [begin, end); none where end <= begin
  int64_t begin, end;
};

SPK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SPK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

SPK_INLINE Run prompt_run(const AttentionProblem& problem, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.prompt_length + sequence.keys - sequence.queries + query;
  Run run = {0, sequence.prompt_length};
  if (problem.causal) run.end = least(run.end, position + 1);
  if (problem.window > 0) run.begin = most(0, position - problem.window + 1);
  return run;
}

SPK_INLINE Run own_run(const AttentionProblem& problem, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.keys - sequence.queries + query;
  Run run = {0, sequence.key_length};
  if (problem.causal) run.end = least(run.end, position + 1);
  if (problem.window > 0) run.begin = most(0, position - problem.window + 1);
  return run;
}

// The prompt keys that a unit looks at, of those that a query sees.
SPK_INLINE Run prompt_run_of(const Unit& unit, const Run& run) {
  return {most(run.begin, unit.prompt_begin), least(run.end, unit.prompt_end)};
}

}  // namespace softprompt
