// prompt_attention as the bindings call it, with checked sizes. It plans the work, takes memory and runs the threads.
#pragma once

#include "cpu/attention/plan.h"
#include "cpu/attention/problem.h"

namespace softprompt {

struct ForwardOutputs {
  Strided out;  // token-major: [B, M, Hq, Dv], contiguous
  float* lse;   // [B, Hq, M], contiguous
};

// Throws std::invalid_argument if an index tensor is out of range, or std::bad_alloc. Outputs are then unchanged.
void run_attention_forward(AttentionProblem problem, const AttentionSizes& sizes, const ForwardOutputs& outputs);

struct BackwardInputs {
  Strided out, grad_out;
  const float* lse;
  const float* grad_lse;  // nullptr: zero
};

// A gradient whose data is nullptr is not needed. grad_query is token-major and contiguous; grad_sinks is [Hq].
struct BackwardOutputs {
  Strided grad_query, grad_key, grad_value, grad_prompt_key, grad_prompt_value;
  float* grad_sinks;
};

void run_attention_backward(AttentionProblem problem, const AttentionSizes& sizes, const BackwardInputs& inputs,
                            const BackwardOutputs& outputs);

}  // namespace softprompt
