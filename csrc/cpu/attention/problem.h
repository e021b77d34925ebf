// The arguments of the attention kernels: `attention.cpp` fills them in, `plan.cpp` plans the work, threads read them.
//
// Notation as in `kernels/problems/attention.py`: B sequences of M queries and N own keys, R prompts of P keys, Hq
// query heads on Hkv key heads, g = Hq / Hkv, head sizes D and Dv.
//
// Rows. For one key head, a sequence has M * g rows: its queries, with the g heads of a token next to each other. So
// neighbouring rows see nearly the same keys.
//
// Work units. A work unit is a set of rows that one thread works on at a time: a slice of one long sequence, or slices
// of several short sequences that see the same prompt. Units are ordered by key head, prompt and sequence. Each thread
// takes consecutive units, so that few threads add to the gradients of one prompt's keys.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace softprompt {

constexpr int64_t kUnitRows = 512;  // the most rows of a work unit; see `plan_attention`
constexpr int64_t kTileKeys = 64;   // keys that are packed at a time

// A tensor [batch, head, token, size] whose last dimension is contiguous. Strides are in elements.
struct Strided {
  char* data;
  int64_t batch, head, token;
};

// The address of the row of (batch, head, token).
static inline char* row_of(const Strided& tensor, Dtype dtype, int64_t batch, int64_t head, int64_t token) {
  const int64_t offset = batch * tensor.batch + head * tensor.head + token * tensor.token;
  return tensor.data + kBytes[static_cast<int>(dtype)] * offset;
}

struct Sequence {
  int64_t batch;
  int64_t first_query, queries;         // tokens of the query tensor
  int64_t first_key, keys, key_length;  // tokens of the key tensor; those from key_length on are padding
  int64_t prompt, prompt_length;
  // Own key j is at position prompt_length + j, query i at prompt_length + keys - queries + i.
};

// Some rows of one sequence, as a part of a work unit.
struct SequenceSlice {
  int64_t sequence;
  int64_t row, rows;  // the first one and how many, out of the queries * g rows of the sequence
  bool shared;        // other threads have rows of this sequence and key head
};

struct WorkUnit {
  int64_t kv_head, prompt;
  int64_t first_slice, slices;
  int64_t rows;                      // of all its slices, each rounded up to row_align
  int64_t row_align;                 // a slice begins at a multiple of it
  int64_t prompt_begin, prompt_end;  // the prompt keys that this unit attends to
  bool own;                          // whether it attends to own keys
  bool prompt_shared;                // other threads have rows of this prompt and key head
  int64_t partial_row;               // its first row in the split-KV partial results; -1: it is not split
};

struct AttentionProblem {
  Strided query, key, value, prompt_key, prompt_value;
  const float* sinks;  // [Hq], nullptr: none
  int64_t heads, kv_heads, group, size, value_size;
  Dtype dtype;
  bool causal;     // also true if there is a window
  int64_t window;  // 0: none
  float softcap;   // 0: none
  float scale;
  int64_t row_align;  // alignment of the first row of a slice; not applied to slices with less than half as many rows
  const Sequence* sequences;
  const SequenceSlice* slices;
  const WorkUnit* units;
  const int64_t* thread_units;  // [threads + 1]: thread t works on units thread_units[t] up to thread_units[t + 1]
  int threads;
};

// The units of a split-KV group. They have the same rows, and each attends to a part of the keys.
struct SplitGroup {
  int64_t first_unit, units;
};

struct AttentionForward {
  AttentionProblem problem;
  Strided out;      // [B, Hq, M, Dv] in the problem's dtype
  float* lse;       // [B, Hq, M], contiguous
  int64_t queries;  // M
  char* workspace;  // attention_forward_workspace bytes for each thread
  int64_t workspace_bytes;
  float* partials;  // [partial rows, 2 + Dv rounded up to lanes]: softmax base, row sum, unnormalised output
  const SplitGroup* split_groups;
  int64_t split_group_count;
};

// The keys of a prompt or of a sequence, for one key head. Their gradients are accumulated together.
struct KeyRange {
  int64_t batch, head, first, count;  // tokens [first, first + count) of (batch, head) of the gradient
};

// Keys to whose gradients several threads add, from first_thread to last_thread.
struct SharedRange {
  KeyRange keys;
  int64_t first_thread, last_thread;
  int64_t first_buffer;  // the buffer of first_thread; the other threads use their buffer 0
};

// dK and dV of the own keys or of the prompt keys, and the fp32 buffers that they are accumulated in.
//
// Units are ordered, so a thread finishes one key range before it begins the next. It may share its first range with
// the threads before it, and its last range with those after it. So each thread needs two buffers: buffer 0 for its
// first range, buffer 1 for all others in turn. A range that no other thread adds to is written to the gradient as soon
// as it is complete. A shared range stays in the buffers. When all threads are done, their partial sums are added in
// the order of the threads, so the result is the same bit for bit in every run.
struct KeyGradients {
  bool needed;
  Strided grad_key, grad_value;  // data nullptr: not needed
  float* buffers;  // [threads, 2, buffer_floats], buffer_floats = keys * (D + Dv), each rounded up to lanes
  int64_t buffer_floats;
  const SharedRange* shared;
  int64_t shared_count;
};

struct AttentionBackward {
  AttentionProblem problem;
  Strided out, grad_out;  // [B, Hq, M, Dv] in the problem's dtype
  const float* lse;       // [B, Hq, M], contiguous
  const float* grad_lse;  // [B, Hq, M], contiguous; nullptr: zero
  int64_t queries;        // M
  bool need_query;
  Strided grad_query;
  KeyGradients own, prompt;
  int64_t prompt_keys;  // P
  double* grad_sinks;   // [threads, Hq], set to zero by the caller; nullptr: not needed
  char* workspace;      // attention_backward_workspace bytes for each thread
  int64_t workspace_bytes;
};

}  // namespace softprompt
