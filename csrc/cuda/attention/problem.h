// Calls of the attention kernels, as launchers take them. Pointers are on the device, strides in elements.
//
// Notation as in kernels/problems/attention.py: B sequences of M queries and N own keys, R prompts of P keys, Hq query
// heads on Hkv key heads, g = Hq / Hkv, head size D for queries, keys and values.
//
// The rows of a sequence and a key head are its M g queries, the g heads of a token next to each other (row r is query
// r / g), so that neighbouring rows see nearly the same keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tensor.h"

namespace softprompt {

// [batch, head, token, D], its last dimension dense, its rows at multiples of 16 bytes.
struct HeadTensor {
  void* data;
  int64_t batch, head, token;
};

// M g and P + N + M are below 2^30, and so is the window.
struct AttentionProblem {
  HeadTensor query, key, value;         // [B, Hq, M, D], [B, Hkv, N, D] twice
  HeadTensor prompt_key, prompt_value;  // [R, Hkv, P, D]
  const int64_t* prompt_index;          // [B], nullptr: prompt 0 for all if R = 1, else prompt b for sequence b
  const int64_t* prompt_lengths;        // [R], nullptr: all P
  const int64_t* key_lengths;           // [B], nullptr: all N
  Dtype dtype;                          // bf16 or fp16
  int batch, heads, kv_heads, group, size;
  int queries, keys, prompts, prompt_keys;
  bool causal;
  int window;     // 0: none; with one, causal is set
  float softcap;  // 0: none
  float scale;
};

struct AttentionOutputs {
  HeadTensor out;  // [B, Hq, M, D]
  float* lse;      // [B, Hq, M], natural logarithm
};

// data == nullptr: not needed.
struct AttentionGradients {
  HeadTensor query, key, value, prompt_key, prompt_value;
};

struct AttentionBackward {
  HeadTensor out, grad_out;  // [B, Hq, M, D]
  const float* lse;          // [B, Hq, M]
  const float* grad_lse;     // [B, Hq, M], nullptr: 0
  float* delta;              // [B, Hq, M], scratch
  int splits;                // blocks that share the rows of a prompt's tile of keys
  float* prompt_key_parts;   // [splits, R, Hkv, P, D], scratch where splits > 1 and the gradient is needed
  float* prompt_value_parts;
  AttentionGradients gradients;
};

void attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream);
void attention_backward(const AttentionProblem& problem, const AttentionBackward& backward, cudaStream_t stream);

}  // namespace softprompt
