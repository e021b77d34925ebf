// Calls of the attention kernels: what `attention.cpp` checks, plans and fills in, and what each thread reads.
//
// Notation as in `kernels/attention_problem.py`: B sequences of M queries and N own keys, R prompts of P keys, Hq query
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

constexpr int64_t kUnitRows = 256;  // at most; see `plan_units`
constexpr int64_t kTileKeys = 64;   // keys that are packed at a time

// A tensor [batch, head, token, size] whose last dimension lies densely in memory; strides in elements.
struct Strided {
  char* data;
  int64_t batch, head, token;
};

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
};

struct Unit {
  int64_t kv_head, prompt;
  int64_t first_piece, pieces, rows;
  int64_t prompt_begin, prompt_end;  // the prompt keys that this unit looks at
  bool own;                          // whether it looks at own keys
  int64_t partial;                   // >= 0: first row of its part of a result that is merged later; -1: it is whole
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
  const Sequence* sequences;
  const Piece* pieces;
  const Unit* units;
  const int64_t* thread_units;  // [threads + 1]: thread t works on units thread_units[t] up to thread_units[t + 1]
  int threads;
};

struct AttentionForward {
  AttentionProblem problem;
};

struct AttentionBackward {
  AttentionProblem problem;
};

}  // namespace softprompt
