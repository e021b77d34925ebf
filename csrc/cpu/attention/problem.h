// Calls of the attention kernels: what `attention.cpp` checks, plans and fills in, and what each thread reads.
//
// Notation as in `kernels/problems/attention.py`: B sequences of M queries and N own keys, R prompts of P keys, Hq query
// heads on Hkv key heads, g = Hq / Hkv, head sizes D and Dv.
//
// The rows of a sequence and a key head are its M * g queries, the g heads of a token next to each other, so that
// neighbouring rows see nearly the same keys. A unit is a run of such rows that one thread works on at a time: a part of
// one long sequence, or several short sequences (pieces) that see the same prompt. Units are ordered by key head,
// prompt and sequence, and each thread takes a run of them, so that the keys of one prompt are summed by few threads.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

constexpr int64_t kUnitRows = 512;  // of a unit, at most; see `plan_attention`
constexpr int64_t kTileKeys = 64;   // keys that are packed at a time

// A tensor [batch, head, token, size] whose last dimension lies densely in memory; strides in elements.
struct Strided {
  char* data;
  int64_t batch, head, token;
};

// Where the row of (batch, head, token) begins.
static inline char* row_of(const Strided& tensor, Dtype dtype, int64_t batch, int64_t head, int64_t token) {
  const int64_t offset = batch * tensor.batch + head * tensor.head + token * tensor.token;
  return tensor.data + kBytes[static_cast<int>(dtype)] * offset;
}

struct Sequence {
  int64_t batch;
  int64_t first_query, queries;           // tokens of the query tensor
  int64_t first_key, keys, key_length;    // tokens of the key tensor; those from key_length on are padding
  int64_t prompt, prompt_length;
  // Own key j stands at position prompt_length + j, query i at prompt_length + keys - queries + i.
};

struct Piece {
  int64_t sequence;
  int64_t row, rows;  // of the queries * g rows of the sequence
  bool shared;        // other threads have rows of this sequence and key head
};

struct Unit {
  int64_t kv_head, prompt;
  int64_t first_piece, pieces;
  int64_t rows;                      // of its pieces, each up to a multiple of
  int64_t row_align;                 // at which a piece begins
  int64_t prompt_begin, prompt_end;  // the prompt keys that this unit looks at
  bool own;                          // whether it looks at own keys
  bool prompt_shared;                // other threads have rows of this prompt and key head
  int64_t partial;                   // >= 0: where its rows begin among the partial results; -1: it is whole
};

struct AttentionProblem {
  Strided query, key, value, prompt_key, prompt_value;
  const float* sinks;  // [Hq], nullptr: none
  int64_t heads, kv_heads, group, size, value_size;
  Dtype dtype;
  bool causal;      // also where there is a window
  int64_t window;   // 0: none
  float softcap;    // 0: none
  float scale;
  int64_t row_align;  // that the kernels want of pieces that fill half of it or more
  const Sequence* sequences;
  const Piece* pieces;
  const Unit* units;
  const int64_t* thread_units;  // [threads + 1]: thread t works on units thread_units[t] up to thread_units[t + 1]
  int threads;
};

// Several units that look at the same rows and at parts of the keys.
struct Merge {
  int64_t first_unit, units;
};

struct AttentionForward {
  AttentionProblem problem;
  Strided out;             // [B, Hq, M, Dv] in the problem's dtype
  float* lse;              // [B, Hq, M], contiguous
  int64_t queries;         // M
  char* workspace;         // attention_forward_workspace bytes for each thread
  int64_t workspace_bytes;
  float* partial;          // [partial rows, 2 + Dv up to lanes]: base, sum, and output before its division
  const Merge* merges;
  int64_t merge_count;
};

// Keys whose gradients are summed together: those of a prompt or of a sequence, for one key head.
struct KeyRange {
  int64_t batch, head, first, count;  // tokens [first, first + count) of (batch, head) of the gradient
};

// A range that several threads have a part of, from first_thread to last_thread.
struct SharedRange {
  KeyRange keys;
  int64_t first_thread, last_thread;
  int64_t first_buffer;  // of first_thread; the others have their part in buffer 0
};

// Where the gradients of one kind of keys are summed, in fp32.
//
// Units are ordered, so a thread meets ranges one after the other; the first it may share with the threads before it,
// and the last with those after it. So two buffers serve a thread: 0 for its first range, 1 for all others in turn. A
// range that it has alone is written to the gradient when it is complete; what is shared stays in the buffers and is
// added up in the order of the threads when all are done, so the sum has the same bits in every run.
struct KeySums {
  bool needed;
  Strided grad_key, grad_value;  // data nullptr: that one is not needed
  float* buffers;                // [threads, 2, buffer_floats], buffer_floats = keys * (D + Dv, each up to lanes)
  int64_t buffer_floats;
  const SharedRange* shared;
  int64_t shared_count;
};

struct AttentionBackward {
  AttentionProblem problem;
  Strided out, grad_out;   // [B, Hq, M, Dv] in the problem's dtype
  const float* lse;        // [B, Hq, M], contiguous
  const float* grad_lse;   // the same, nullptr: 0
  int64_t queries;         // M
  bool need_query;
  Strided grad_query;
  KeySums own, prompt;
  int64_t prompt_keys;     // P
  double* grad_sinks;      // [threads, Hq], zeroed; nullptr: not needed
  char* workspace;         // attention_backward_workspace bytes for each thread
  int64_t workspace_bytes;
};

}  // namespace softprompt
