// What a translation unit compiled for one instruction set defines: the work of one thread of each op.
#pragma once

#include "cpu/attention/problem.h"
#include "cpu/losses/kl.h"
#include "cpu/gemm/gemm.h"

namespace softprompt::SPK_ISA {

#ifdef SPK_AMX
constexpr bool kHasMatrixUnit = true;
constexpr int64_t kMostProductDepth = INT32_MAX;
constexpr int64_t kBackwardRowAlign = 32;  // that one instruction sums over
#else
constexpr bool kHasMatrixUnit = false;
constexpr int64_t kMostProductDepth = 2048;
constexpr int64_t kBackwardRowAlign = 1;
#endif

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

#ifdef SPK_PRODUCTS
// Of a part with as many rows and as much depth as any.
int64_t product_left_bytes(const Product& part);
int64_t product_workspace(const Product& part);
void product_pack_left(const ProductPart& part, int thread);
void product(const ProductPart& part, int thread);
#else
constexpr int64_t (*product_left_bytes)(const Product&) = nullptr;
constexpr int64_t (*product_workspace)(const Product&) = nullptr;
constexpr void (*product_pack_left)(const ProductPart&, int) = nullptr;
constexpr void (*product)(const ProductPart&, int) = nullptr;
#endif

}  // namespace softprompt::SPK_ISA
