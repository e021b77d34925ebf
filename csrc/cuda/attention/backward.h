// The launches of a backward, in the order in which they must run.
#pragma once

#include "cuda/attention/problem.h"

namespace softprompt {

// delta of all rows, and dQ if it is needed.
void attention_backward_dq(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

// dK and dV of own keys and of prompts. If splits > 1, prompt gradients are written as partial sums.
void attention_backward_dkdv(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

// Adds up the partial sums of the splits, in order.
void attention_reduce_splits(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

}  // namespace softprompt
