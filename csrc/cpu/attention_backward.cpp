// Attention over [prompt ; own tokens], backward, from the saved out and lse of both segments together.
//
// For a block of rows and a tile of keys, with delta = rowsum(dO * out) - dlse of each row,
//
//     P = exp(S - lse)      dS = P * (dO Vᵀ - delta)      dV += Pᵀ dO      dK += scale dSᵀ Q      dQ += scale dS K
//
// where a softcap makes S = c tanh(x / c) and multiplies dS by 1 - tanh². Five products, each computed once: dQ of a
// unit's rows stays with the unit, dK and dV are added to fp32 sums that the units of a thread share (see KeySums).
// Q is packed times the scale and log2 e (or 1 / c), which is taken out of dK when a sum is complete.
#include "attention.h"
#include "attention_rows.h"
#include "gemm.h"
#include "key_sums.h"
#include "kernels.h"
#include "pack.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kBlockRows = 96;  // rows whose P and dS exist at a time: each 24 KiB
constexpr int64_t kBlockTiles = kBlockRows / kTileRows;

struct Workspace {
  float *query, *grad_query;     // [kUnitRows, D up to lanes]
  float *grad_out, *out;         // [kUnitRows, Dv up to lanes], and one row of out
  float *lse, *delta;            // [kUnitRows], lse in units of log 2, +inf where the row sees no key
  Run *visible, *runs;           // [kUnitRows], of all keys and of those of a segment
  float *key_rows, *keys;        // [kTileKeys, D], [D, kTileKeys]
  float *value_rows, *values;    // [kTileKeys, Dv], [Dv, kTileKeys]
  float *weights, *grad_scores;  // [kBlockRows, kTileKeys]
  int64_t size, value_size;      // D and Dv up to lanes

  Workspace(const AttentionProblem& problem, Arena& arena)
      : size(round_up(problem.size, kLanes)), value_size(round_up(problem.value_size, kLanes)) {
    query = arena.take<float>(kUnitRows * size);
    grad_query = arena.take<float>(kUnitRows * size);
    grad_out = arena.take<float>(kUnitRows * value_size);
    out = arena.take<float>(value_size);
    lse = arena.take<float>(kUnitRows);
    delta = arena.take<float>(kUnitRows);
    visible = arena.take<Run>(kUnitRows);
    runs = arena.take<Run>(kUnitRows);
    key_rows = arena.take<float>(kTileKeys * size);
    keys = arena.take<float>(size * kTileKeys);
    value_rows = arena.take<float>(kTileKeys * value_size);
    values = arena.take<float>(value_size * kTileKeys);
    weights = arena.take<float>(kBlockRows * kTileKeys);
    grad_scores = arena.take<float>(kBlockRows * kTileKeys);
  }
};

// One row of scores and of dO Vᵀ against one tile: they become P and dS.
template <bool masked, bool capped>
SPK_INLINE void gradient_row(const AttentionProblem& problem, const Run& run, int64_t tile, const Seen& seen, float lse,
                             float delta, float* scores, float* grad) {
  const VisibleColumns visible(run, tile);
  for (int column = seen.first; column < seen.first + seen.vectors * kLanes; column += kLanes) {
    Vec score = load(scores + column), slope = {};
    if (capped) {
      const Vec tangent = tanh(score);
      slope = 1.0f - tangent * tangent;
      score = tangent * (problem.softcap * kLog2E);
    }
    if (masked) score = select(visible.at(column), score, splat(-kInfinity));
    const Vec weight = exp2(score - lse);
    Vec gradient = weight * (load(grad + column) - delta);
    if (capped) gradient *= slope;
    store(scores + column, weight);
    store(grad + column, gradient);
  }
}

SPK_INLINE void clear_columns(float* row, int begin, int end) {
  for (int column = begin; column < end; column += kLanes) store(row + column, Vec{});
}

// A block of rows, in tiles of kTileRows.
struct Block {
  int64_t row[kBlockTiles + 1];  // first row of each tile of rows, in the unit
  Seen seen[kBlockTiles];
  int count = 0;
  int begin = kTileKeys, end = 0;  // columns that any of them computes, multiples of kLanes

  Block(const Workspace& ws, const Blocks& tiles, int64_t first_row, int64_t first_tile, bool ordered, int64_t tile,
        int width) {
    for (; count < kBlockTiles && first_tile + count < tiles.blocks; ++count) {
      row[count] = first_row + tiles.start(first_tile + count);
      row[count + 1] = first_row + tiles.start(first_tile + count + 1);
      const Seen& found = seen[count] =
          seen_of_tile(ws.runs + row[count], static_cast<int>(row[count + 1] - row[count]), ordered, tile, width);
      if (found.vectors == 0) continue;
      begin = found.first < begin ? found.first : begin;
      const int computed = found.first + found.vectors * kLanes;
      end = computed > end ? computed : end;
    }
  }
};

// P and dS of a block; 0 where a tile of rows does not look.
void score_block(const AttentionProblem& problem, Workspace& ws, const Block& block, int64_t tile) {
  const bool capped = problem.softcap > 0;
  for (int t = 0; t < block.count; ++t) {
    const Seen& seen = block.seen[t];
    const int64_t row = block.row[t];
    const int rows = static_cast<int>(block.row[t + 1] - row);
    float* scores = ws.weights + (row - block.row[0]) * kTileKeys;
    float* grad = ws.grad_scores + (row - block.row[0]) * kTileKeys;
    const int computed = seen.first + seen.vectors * kLanes;
    if (seen.vectors > 0) {
      gemm_rows<Layout::rows>(rows, seen.vectors * kLanes, problem.size, ws.query + row * ws.size, ws.size,
                              ws.keys + seen.first, kTileKeys, scores + seen.first, kTileKeys, false);
      gemm_rows<Layout::rows>(rows, seen.vectors * kLanes, problem.value_size, ws.grad_out + row * ws.value_size,
                              ws.value_size, ws.values + seen.first, kTileKeys, grad + seen.first, kTileKeys, false);
    }
    const auto turn = !seen.whole ? (capped ? gradient_row<true, true> : gradient_row<true, false>)
                                  : (capped ? gradient_row<false, true> : gradient_row<false, false>);
    for (int i = 0; i < rows; ++i) {
      float *score_row = scores + i * kTileKeys, *grad_row = grad + i * kTileKeys;
      turn(problem, ws.runs[row + i], tile, seen, ws.lse[row + i], ws.delta[row + i], score_row, grad_row);
      float* const both[] = {score_row, grad_row};
      for (float* row_of_block : both) {
        clear_columns(row_of_block, block.begin, seen.vectors > 0 ? seen.first : block.end);
        clear_columns(row_of_block, seen.vectors > 0 ? computed : block.end, block.end);
      }
    }
  }
}

// dQ of a block, from its dS.
void add_grad_query(Workspace& ws, const Block& block) {
  for (int t = 0; t < block.count; ++t) {
    const Seen& seen = block.seen[t];
    if (seen.vectors == 0) continue;
    const int64_t row = block.row[t];
    gemm_rows<Layout::rows>(static_cast<int>(block.row[t + 1] - row), ws.size, seen.end - seen.first,
                            ws.grad_scores + (row - block.row[0]) * kTileKeys + seen.first, kTileKeys,
                            ws.key_rows + seen.first * ws.size, ws.size, ws.grad_query + row * ws.size, ws.size, true);
  }
}

// dK and dV of the keys of one source, at the columns [begin, end) of a tile, from P and dS of a block. Rows that do not
// see some keys are left out at both ends.
void add_grad_keys(Workspace& ws, const Block& block, int begin, int end, int64_t first_key, const KeySum& sum) {
  const Blocks columns(end - begin, kTileRows);
  for (int64_t c = 0; c < columns.blocks; ++c) {
    const int first = begin + static_cast<int>(columns.start(c)), last = begin + static_cast<int>(columns.start(c + 1));
    int low = 0, high = block.count;
    const auto unseen = [&](const Seen& seen) {
      return seen.vectors == 0 || seen.end <= first || seen.first >= last;
    };
    while (low < high && unseen(block.seen[low])) ++low;
    while (low < high && unseen(block.seen[high - 1])) --high;
    if (low == high) continue;
    const int64_t row = block.row[low], rows = block.row[high] - row, key = first_key + first - begin;
    const int64_t offset = (row - block.row[0]) * kTileKeys + first;
    if (sum.value != nullptr) {
      gemm_rows<Layout::columns>(last - first, ws.value_size, rows, ws.weights + offset, kTileKeys,
                                 ws.grad_out + row * ws.value_size, ws.value_size, sum.value + key * ws.value_size,
                                 ws.value_size, true);
    }
    if (sum.key != nullptr) {
      gemm_rows<Layout::columns>(last - first, ws.size, rows, ws.grad_scores + offset, kTileKeys,
                                 ws.query + row * ws.size, ws.size, sum.key + key * ws.size, ws.size, true);
    }
  }
}

// Rows [first, first + count) of a unit against all keys of a segment that any of them sees; the gradients of a source's
// keys are added to its sum.
void backward_segment(const AttentionBackward& call, Workspace& ws, int64_t first, int64_t count,
                      const Segment& segment, const KeySum (&sums)[2]) {
  const AttentionProblem& problem = call.problem;
  clip_runs(ws.visible, segment, first, count, ws.runs);
  const Blocks tiles(count, kTileRows);
  for_each_tile(hull(ws.runs + first, count), [&](int64_t tile, int width) {
    pack_tile(segment, &Source::key, problem.dtype, tile, width, problem.size, ws.key_rows);
    transpose_rows(ws.key_rows, ws.size, width, problem.size, ws.keys);
    pack_tile_columns(segment, &Source::value, problem.dtype, tile, width, problem.value_size, ws.value_rows,
                      ws.values);
    for (int64_t t = 0; t < tiles.blocks; t += kBlockTiles) {
      const Block block(ws, tiles, first, t, segment.ordered, tile, width);
      if (block.begin >= block.end) continue;
      score_block(problem, ws, block, tile);
      if (call.need_query) add_grad_query(ws, block);
      for (int s = 0; s < segment.count; ++s) {
        const Source& source = segment.sources[s];
        const int64_t begin = most(source.begin, tile + block.begin);
        const int64_t end = least(source.end, tile + least(width, block.end));
        if (begin >= end || (sums[s].key == nullptr && sums[s].value == nullptr)) continue;
        add_grad_keys(ws, block, static_cast<int>(begin - tile), static_cast<int>(end - tile),
                      source.token + begin - source.begin - sums[s].first_token, sums[s]);
      }
    }
  });
}

// Packs what a unit's rows need: Q, dO, lse and delta; adds their part of the sinks' gradient.
void load_rows(const AttentionBackward& call, Workspace& ws, const Unit& unit, double* grad_sinks) {
  const AttentionProblem& problem = call.problem;
  const float scale = query_scale(problem);
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    float *packed = ws.query + row * ws.size, *grad = ws.grad_out + row * ws.value_size;
    for (int64_t d = 0; d < ws.size; d += kLanes) store(ws.grad_query + row * ws.size + d, Vec{});
    ws.visible[row] = visible_run(problem, at.sequence(), at.query());
    const int64_t first = (at.sequence().batch * problem.heads + at.head()) * call.queries + at.sequence().first_query;
    const float lse = call.lse[first + at.query()];
    if (lse == -kInfinity) {  // it sees no key, may hold anything, and gives nothing
      for (int64_t d = 0; d < ws.size; d += kLanes) store(packed + d, Vec{});
      for (int64_t d = 0; d < ws.value_size; d += kLanes) store(grad + d, Vec{});
      ws.lse[row] = kInfinity;
      ws.delta[row] = 0;
      return;
    }
    read_row(problem.dtype, at.address(problem.query), problem.size, scale, packed);
    read_row(problem.dtype, at.address(call.grad_out), problem.value_size, 1, grad);
    read_row(problem.dtype, at.address(call.out), problem.value_size, 1, ws.out);
    Vec product = {};
    for (int64_t d = 0; d < ws.value_size; d += kLanes) product += load(grad + d) * load(ws.out + d);
    ws.lse[row] = lse * kLog2E;
    ws.delta[row] = sum_lanes(product) - (call.grad_lse == nullptr ? 0 : call.grad_lse[first + at.query()]);
    if (grad_sinks != nullptr) {
      const float share = exp2(splat((problem.sinks[at.head()] - lse) * kLog2E))[0];
      grad_sinks[at.head()] -= static_cast<double>(share) * ws.delta[row];
    }
  });
}

void store_grad_query(const AttentionBackward& call, const Workspace& ws, const Unit& unit) {
  const AttentionProblem& problem = call.problem;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    write_row(problem.dtype, at.address(call.grad_query), problem.size, problem.scale, ws.grad_query + row * ws.size);
  });
}

// dK is a sum over packed queries, which carry their scale.
float key_scale(const AttentionProblem& problem) {
  return problem.softcap > 0 ? problem.softcap : 1 / kLog2E;
}

void backward_unit(const AttentionBackward& call, Workspace& ws, const Unit& unit, ThreadSums& prompt_sums,
                   ThreadSums& own_sums, double* grad_sinks) {
  const AttentionProblem& problem = call.problem;
  load_rows(call, ws, unit, grad_sinks);
  const KeySum prompt_sum = prompt_sums.of({unit.prompt, unit.kv_head, 0, call.prompt_keys}, unit.prompt_shared);
  const Piece* piece = problem.pieces + unit.first_piece;
  for_each_segment(problem, unit, [&](int64_t first, int64_t rows, const Segment& segment) {
    KeySum sums[2] = {prompt_sum, {}};
    const bool of_prompt_alone = segment.count == 1 && segment.sources[0].key == &problem.prompt_key;
    if (!of_prompt_alone) {
      const Sequence& sequence = problem.sequences[piece->sequence];
      sums[segment.count - 1] =
          own_sums.of({sequence.batch, unit.kv_head, sequence.first_key, sequence.keys}, piece->shared);
      ++piece;
    }
    if (call.need_query) {
      backward_segment(call, ws, first, rows, segment, sums);
    } else {  // only the keys whose gradients are wanted
      for (int s = 0; s < segment.count; ++s) {
        const Segment part = {{segment.sources[s], {}}, 1, segment.ordered};
        if (sums[s].key || sums[s].value) backward_segment(call, ws, first, rows, part, {sums[s], {}});
      }
    }
  });
  if (call.need_query) store_grad_query(call, ws, unit);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionProblem& problem) {
  return arena_bytes<Workspace>(problem);
}

void attention_backward(const AttentionBackward& call, int thread) {
  const AttentionProblem& problem = call.problem;
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(problem, arena);
  ThreadSums prompt_sums(problem, call.prompt, thread, key_scale(problem));
  ThreadSums own_sums(problem, call.own, thread, key_scale(problem));
  double* grad_sinks = call.grad_sinks == nullptr ? nullptr : call.grad_sinks + thread * problem.heads;
  for (int64_t u = problem.thread_units[thread]; u < problem.thread_units[thread + 1]; ++u) {
    backward_unit(call, ws, problem.units[u], prompt_sums, own_sums, grad_sinks);
  }
  prompt_sums.complete();
  own_sums.complete();
}

void attention_fold(const AttentionBackward& call, int thread) {
  fold_shared(call.problem, call.prompt, thread, key_scale(call.problem));
  fold_shared(call.problem, call.own, thread, key_scale(call.problem));
}

}  // namespace softprompt::SPK_ISA
