// Attention over [prompt ; own tokens], forward: one online softmax over both.
//
// For each tile of keys and each block of kTileRows rows, with scores s in units of log 2,
//
//     S = Q Kᵀ      m' = max(m, max S)      P = 2^(S - m')      l' = 2^(m - m') l + Σ P      O' = 2^(m - m') O + P V
//
// and at the end out = O / l, lse = ln2 m + log l, where a sink adds exp(sink) to l. The keys of a tile are packed once
// for up to kUnitRows rows, K transposed; S, P and the tile stay in the first cache. O is only rescaled when m changes.
#include "attention.h"
#include "attention_rows.h"
#include "gemm.h"
#include "kernels.h"
#include "pack.h"

namespace softprompt::SPK_ISA {

namespace {

struct Workspace {
  float *query, *output;        // [kUnitRows, D or Dv up to lanes]
  float *maximum, *sum;         // [kUnitRows], [kUnitRows, kLanes]
  float *rows, *keys, *values;  // [kTileKeys, D], [D, kTileKeys], [kTileKeys, Dv]
  float* scores;                // [kTileRows, kTileKeys]
  Run* runs;                    // [kUnitRows]
  int64_t size, value_size;     // D and Dv up to lanes

  Workspace(const AttentionProblem& problem, uintptr_t memory)
      : size(round_up(problem.size, kLanes)), value_size(round_up(problem.value_size, kLanes)) {
    const auto take = [&](int64_t floats) {
      float* taken = reinterpret_cast<float*>(memory);
      memory += round_up(floats * 4, 64);
      return taken;
    };
    query = take(kUnitRows * size);
    output = take(kUnitRows * value_size);
    maximum = take(kUnitRows);
    sum = take(kUnitRows * kLanes);
    rows = take(kTileKeys * size);
    keys = take(size * kTileKeys);
    values = take(kTileKeys * value_size);
    scores = take(kTileRows * kTileKeys);
    runs = reinterpret_cast<Run*>(take(kUnitRows * 4));
    end = memory;
  }
  uintptr_t end;
};

// One row of scores against one tile: S becomes P, the row's maximum and sum go on, its output is rescaled.
template <bool masked, bool capped>
SPK_INLINE void softmax_row(const AttentionProblem& problem, const Run& run, int64_t tile, const Seen& seen,
                            float* scores, float& maximum, float* sum, float* output, int64_t value_size) {
  scores += seen.first;
  Vec largest = splat(-kInfinity);
  for (int v = 0; v < seen.vectors; ++v) {
    Vec score = load(scores + v * kLanes);
    if (capped) score = tanh(score) * (problem.softcap * kLog2E);
    if (masked) score = select(visible(run, tile, seen.first + v * kLanes), score, splat(-kInfinity));
    if (capped || masked) store(scores + v * kLanes, score);
    largest = max(score, largest);
  }
  const float found = max_lanes(largest), before = maximum, after = found > before ? found : before;
  Vec total = load(sum);
  if (after > before) {
    maximum = after;
    const Vec shrink = exp2(splat(before - after));  // 0 at first: 2^-inf
    total *= shrink;
    for (int64_t d = 0; d < value_size; d += kLanes) store(output + d, load(output + d) * shrink);
  }
  const Vec base = splat(after == -kInfinity ? 0 : after);  // a row that has not seen a key yet
  for (int v = 0; v < seen.vectors; ++v) {
    const Vec weight = exp2(load(scores + v * kLanes) - base);
    store(scores + v * kLanes, weight);
    total += weight;
  }
  store(sum, total);
}

// A few rows against a packed tile.
SPK_INLINE void attend(const AttentionProblem& problem, Workspace& ws, int64_t row, int rows, int64_t tile, int width) {
  const Seen seen = seen_of_tile(ws.runs + row, rows, tile, width);
  if (seen.vectors == 0) return;
  gemm_rows<Layout::rows>(rows, seen.vectors * kLanes, problem.size, ws.query + row * ws.size, ws.size,
                          ws.keys + seen.first, kTileKeys, ws.scores + seen.first, kTileKeys, false);
  const bool capped = problem.softcap > 0;
  const auto softmax = !seen.whole ? (capped ? softmax_row<true, true> : softmax_row<true, false>)
                                   : (capped ? softmax_row<false, true> : softmax_row<false, false>);
  for (int i = 0; i < rows; ++i) {
    const int64_t r = row + i;
    softmax(problem, ws.runs[r], tile, seen, ws.scores + i * kTileKeys, ws.maximum[r], ws.sum + r * kLanes,
            ws.output + r * ws.value_size, ws.value_size);
  }
  gemm_rows<Layout::rows>(rows, ws.value_size, seen.end - seen.first, ws.scores + seen.first, kTileKeys,
                          ws.values + seen.first * ws.value_size, ws.value_size, ws.output + row * ws.value_size,
                          ws.value_size, true);
}

// Rows [first, first + count) of a unit against all keys of one segment that any of them sees.
void attend_segment(const AttentionProblem& problem, Workspace& ws, int64_t first, int64_t count, const Strided& key,
                    const Strided& value, int64_t batch, int64_t head, int64_t first_key) {
  const Blocks blocks(count, kTileRows);
  for_each_tile(hull(ws.runs + first, count), [&](int64_t tile, int width) {
    pack_rows(key, problem.dtype, batch, head, first_key + tile, width, problem.size, ws.rows);
    transpose_rows(ws.rows, width, problem.size, ws.keys);
    pack_rows(value, problem.dtype, batch, head, first_key + tile, width, problem.value_size, ws.values);
    for (int64_t b = 0; b < blocks.blocks; ++b) {
      const int64_t row = blocks.start(b);
      attend(problem, ws, first + row, static_cast<int>(blocks.start(b + 1) - row), tile, width);
    }
  });
}

// out and lse of the rows of a unit, from their running state.
void finish(const AttentionForward& call, const Unit& unit, const float* output, int64_t stride, float* maximum,
            float* sum) {
  const AttentionProblem& problem = call.problem;
  for_each_row(problem, unit, [&](int64_t row, const Sequence& sequence, int64_t query, int64_t head) {
    float inverse = sum[row] == 0 ? 0 : 1 / sum[row];  // 0: it saw no key
    if (problem.sinks != nullptr && sum[row] != 0) {
      const float sink = problem.sinks[head] * kLog2E, base = sink > maximum[row] ? sink : maximum[row];
      const float shrink = exp2(splat(maximum[row] - base))[0];
      sum[row] = sum[row] * shrink + exp2(splat(sink - base))[0];
      maximum[row] = base;
      inverse = shrink / sum[row];
    }
    char* target = row_of(call.out, problem.dtype, sequence.batch, head, sequence.first_query + query);
    write_row(problem.dtype, target, problem.value_size, inverse, output + row * stride);
  });
  for (int64_t i = 0; i < unit.rows; i += kLanes) {  // maximum and sum are padded to whole vectors
    const Vec total = load(sum + i);
    store(sum + i, total == 0.0f ? splat(-kInfinity) : load(maximum + i) * kLn2 + log(total));
  }
  for_each_row(problem, unit, [&](int64_t row, const Sequence& sequence, int64_t query, int64_t head) {
    call.lse[(sequence.batch * problem.heads + head) * call.queries + sequence.first_query + query] = sum[row];
  });
}

void forward_unit(const AttentionForward& call, Workspace& ws, const Unit& unit) {
  const AttentionProblem& problem = call.problem;
  const float scale = query_scale(problem);
  for_each_row(problem, unit, [&](int64_t row, const Sequence& sequence, int64_t query, int64_t head) {
    read_row(problem.dtype, row_of(problem.query, problem.dtype, sequence.batch, head, sequence.first_query + query),
             problem.size, scale, ws.query + row * ws.size);
    ws.maximum[row] = -kInfinity;
    store(ws.sum + row * kLanes, Vec{});
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(ws.output + row * ws.value_size + d, Vec{});
    ws.runs[row] = prompt_run_of(unit, prompt_run(problem, sequence, query));
  });
  attend_segment(problem, ws, 0, unit.rows, problem.prompt_key, problem.prompt_value, unit.prompt, unit.kv_head, 0);
  if (unit.own) {
    for_each_row(problem, unit, [&](int64_t row, const Sequence& sequence, int64_t query, int64_t) {
      ws.runs[row] = own_run(problem, sequence, query);
    });
    int64_t row = 0;
    for (int64_t p = unit.first_piece; p < unit.first_piece + unit.pieces; ++p) {
      const Piece& piece = problem.pieces[p];
      const Sequence& sequence = problem.sequences[piece.sequence];
      attend_segment(problem, ws, row, piece.rows, problem.key, problem.value, sequence.batch, unit.kv_head,
                     sequence.first_key);
      row += piece.rows;
    }
  }
  for (int64_t i = 0; i < unit.rows; ++i) ws.sum[i] = sum_lanes(load(ws.sum + i * kLanes));
  if (unit.partial < 0) {
    finish(call, unit, ws.output, ws.value_size, ws.maximum, ws.sum);
    return;
  }
  const int64_t stride = ws.value_size + 2;
  for (int64_t i = 0; i < unit.rows; ++i) {
    float* target = call.partial + (unit.partial + i) * stride;
    target[0] = ws.maximum[i];
    target[1] = ws.sum[i];
    for (int64_t d = 0; d < ws.value_size; d += kLanes) {
      store(target + 2 + d, load(ws.output + i * ws.value_size + d));
    }
  }
}

// The parts of the same rows joined: m = max m_i, and each l_i and O_i times 2^(m_i - m).
void merge(const AttentionForward& call, Workspace& ws, const Merge& merge) {
  const AttentionProblem& problem = call.problem;
  const Unit& unit = problem.units[merge.first_unit];
  const int64_t stride = ws.value_size + 2;
  for (int64_t row = 0; row < unit.rows; ++row) {
    float maximum = -kInfinity, sum = 0;
    const auto part = [&](int64_t u) {
      return call.partial + (problem.units[merge.first_unit + u].partial + row) * stride;
    };
    for (int64_t u = 0; u < merge.units; ++u) maximum = part(u)[0] > maximum ? part(u)[0] : maximum;
    float* output = ws.output + row * ws.value_size;
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(output + d, Vec{});
    for (int64_t u = 0; u < merge.units; ++u) {
      const float* from = part(u);
      if (from[1] == 0) continue;  // it saw no key
      const Vec weight = exp2(splat(from[0] - (maximum == -kInfinity ? 0 : maximum)));
      sum += from[1] * weight[0];
      for (int64_t d = 0; d < ws.value_size; d += kLanes) {
        store(output + d, load(output + d) + load(from + 2 + d) * weight);
      }
    }
    ws.maximum[row] = maximum;
    ws.sum[row] = sum;
  }
  finish(call, unit, ws.output, ws.value_size, ws.maximum, ws.sum);
}

}  // namespace

int64_t attention_forward_workspace(const AttentionProblem& problem) {
  return static_cast<int64_t>(Workspace(problem, 0).end);
}

void attention_forward(const AttentionForward& call, int thread) {
  const AttentionProblem& problem = call.problem;
  Workspace ws(problem, reinterpret_cast<uintptr_t>(call.workspace) + thread * call.workspace_bytes);
  for (int64_t u = problem.thread_units[thread]; u < problem.thread_units[thread + 1]; ++u) {
    forward_unit(call, ws, problem.units[u]);
  }
}

void attention_merge(const AttentionForward& call, int thread) {
  Workspace ws(call.problem, reinterpret_cast<uintptr_t>(call.workspace) + thread * call.workspace_bytes);
  for (int64_t m = thread; m < call.merge_count; m += call.problem.threads) merge(call, ws, call.merges[m]);
}

}  // namespace softprompt::SPK_ISA
