// The attention kernels of one instruction set: the work of one thread.
#pragma once

#include "cpu/attention/problem.h"

namespace softprompt::SPK_ISA {

#ifdef SPK_AMX
constexpr int64_t kBackwardRowAlign = 32;  // the rows that one instruction sums over
#else
constexpr int64_t kBackwardRowAlign = 1;
#endif

// Bytes of workspace that each thread needs, a multiple of 64.
int64_t attention_forward_workspace(const AttentionProblem& problem);
int64_t attention_backward_workspace(const AttentionProblem& problem);

void attention_forward(const AttentionForward& call, int thread);
void attention_combine(const AttentionForward& call, int thread);  // after all threads: combines split-KV results
void attention_backward(const AttentionBackward& call, int thread);
void attention_reduce(const AttentionBackward& call, int thread);  // after all threads: sums their partial dK and dV

}  // namespace softprompt::SPK_ISA
