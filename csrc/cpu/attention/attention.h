// prompt_attention as the bindings call it: checked sizes in, memory and threads arranged here.
#pragma once

#include "cpu/attention/problem.h"
#include "cpu/attention/plan.h"

namespace softprompt {

struct ForwardOutputs {
  Strided out;  // token-major: [B, M, Hq, Dv] without gaps
  float* lse;   // [B, Hq, M] without gaps
};

// Throws std::invalid_argument for index tensors out of range, std::bad_alloc; outputs are untouched then.
void run_attention_forward(AttentionProblem problem, const AttentionSizes& sizes, const ForwardOutputs& outputs);

struct BackwardInputs {
  Strided out, grad_out;
  const float* lse;
  const float* grad_lse;  // nullptr: 0
};

// data nullptr: that gradient is not needed. grad_query is token-major without gaps, grad_sinks [Hq].
struct BackwardOutputs {
  Strided grad_query, grad_key, grad_value, grad_prompt_key, grad_prompt_value;
  float* grad_sinks;
};

void run_attention_backward(AttentionProblem problem, const AttentionSizes& sizes, const BackwardInputs& inputs,
                            const BackwardOutputs& outputs);

}  // namespace softprompt
