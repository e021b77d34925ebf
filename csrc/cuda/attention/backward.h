// The launches of a backward, in the order in which they must run.
#pragma once

#include "cuda/attention/problem.h"

namespace softprompt {

// delta of all rows, and dQ if it is needed.
void attention_query_gradient(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

// dK and dV of own keys and of prompts; those of prompts in parts where splits > 1.
void attention_key_gradients(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

// Adds up the parts, in order.
void attention_fold(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

}  // namespace softprompt
