// Arguments of the attention kernels. Pointers are to device memory, strides are in elements.
//
// Notation as in kernels/problems/attention.py: B sequences of M queries and N own keys, R prompts of P keys, Hq query
// heads on Hkv key heads, g = Hq / Hkv, head size D for queries, keys and values.
//
// A sequence and key head has M g rows. Row r is query r / g. The g heads of a token are neighbours, so neighbouring
// rows see nearly the same keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// [batch, head, token, D]. The last dimension is dense and every row begins at a multiple of 16 bytes.
struct HeadTensor {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// M g and P + N + M are below 2^30. So is the window.
struct AttentionProblem {
  HeadTensor query, key, value;         // [B, Hq, M, D], [B, Hkv, N, D] twice
  HeadTensor prompt_key, prompt_value;  // [R, Hkv, P, D]
  const int64_t* prompt_index;          // [B]. nullptr: all use prompt 0 if R = 1, else sequence b uses prompt b
  const int64_t* prompt_lengths;        // [R], nullptr: all P
  const int64_t* key_lengths;           // [B], nullptr: all N
  Dtype dtype;                          // bf16 or fp16
  int batch, heads, kv_heads, group, head_size;  // B, Hq, Hkv, g, D
  int queries, keys, prompts, prompt_keys;       // M, N, R, P
  bool causal;
  int window;     // 0: none. A window requires causal
  float softcap;  // 0: none
  float scale;
};

struct AttentionOutputs {
  HeadTensor out;  // [B, Hq, M, D]
  float* lse;      // [B, Hq, M], natural logarithm
};

// data == nullptr: this gradient is not needed.
struct AttentionGradients {
  HeadTensor query, key, value, prompt_key, prompt_value;
};

struct AttentionBackward {
  HeadTensor out, grad_out;  // [B, Hq, M, D]
  const float* lse;          // [B, Hq, M]
  const float* grad_lse;     // [B, Hq, M], nullptr: 0
  float* delta;              // [B, Hq, M], workspace
  int splits;                // blocks that share the rows of one tile of prompt keys
  float* prompt_key_partials;  // [splits, R, Hkv, P, D], workspace if splits > 1 and the gradient is needed
  float* prompt_value_partials;
  AttentionGradients gradients;
};

void attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream);
void attention_backward(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

}  // namespace softprompt
