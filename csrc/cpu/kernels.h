// What a translation unit compiled for one instruction set defines: the work of one thread of each op.
#pragma once

#include "attention.h"
#include "kl.h"

namespace softprompt::SPK_ISA {

// Bytes that each thread needs, a multiple of 64.
int64_t attention_forward_workspace(const AttentionProblem& problem);
int64_t attention_backward_workspace(const AttentionProblem& problem);

void attention_forward(const AttentionForward& call, int thread);
void attention_merge(const AttentionForward& call, int thread);
void attention_backward(const AttentionBackward& call, int thread);
void attention_fold(const AttentionBackward& call, int thread);

void kl_rows(const KlRows& call, int thread);
void kl_logits(const KlLogits& call, int thread);
void expectation_rows(const ExpectationRows& call, int thread);
void kl_tile(const KlTile& call, int thread);

}  // namespace softprompt::SPK_ISA
