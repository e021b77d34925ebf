// The attention kernels of one instruction set: the work of one thread.
#pragma once

#include "cpu/attention/problem.h"

namespace softprompt::SPK_ISA {

#ifdef SPK_AMX
constexpr int64_t kBackwardRowAlign = 32;  // rows that one instruction sums over
#else
constexpr int64_t kBackwardRowAlign = 1;
#endif

// Bytes that each thread needs, a multiple of 64.
int64_t attention_forward_workspace(const AttentionProblem& problem);
int64_t attention_backward_workspace(const AttentionProblem& problem);

void attention_forward(const AttentionForward& call, int thread);
void attention_merge(const AttentionForward& call, int thread);
void attention_backward(const AttentionBackward& call, int thread);
void attention_fold(const AttentionBackward& call, int thread);

}  // namespace softprompt::SPK_ISA
