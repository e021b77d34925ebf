// Attention over [prompt ; own tokens], forward: one online softmax over both.
//
// For each tile of keys and each block of kTileRows rows, with scores in units of log 2 and a base m of each row,
//
//     S = Q Kᵀ      P = 2^(S - m)      l += Σ P      O += P V
//
// and at the end out = O / l, lse = ln2 m + log l, where a sink adds exp(sink) to l. The base need not be the largest
// score, only near it: it moves to it, l and O being multiplied by 2^(m - m'), when a score exceeds it by kSlack. So after
// the first tile of a row that seldom happens, and one comparison for all rows of a block finds out.
//
// The keys of a tile are packed once for up to kUnitRows rows; S, P and the tile stay in the first cache. The products are
// those of a class: VectorForward, or TileForward where there is a matrix unit and the rows fill its tiles.
#include "cpu/attention/problem.h"
#include "cpu/attention/tile_gemm.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/kernels.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kMostBlockRows = 32;
constexpr float kSlack = 8;  // weights stay below 2^8, far from where sums of them lose anything

struct Workspace {
  float *query, *output;        // [kUnitRows, D or Dv up to lanes]
  float *base, *sum;            // [kUnitRows], [kUnitRows, kLanes]
  float* scores;                // [kMostBlockRows, kTileKeys]
  Run *visible, *runs;          // [kUnitRows], of all keys and of those of a segment
  int64_t size, value_size;     // D and Dv up to lanes

  Workspace(const AttentionProblem& problem, Arena& arena)
      : size(round_up(problem.size, kLanes)), value_size(round_up(problem.value_size, kLanes)) {
    query = arena.take<float>(kUnitRows * size);
    output = arena.take<float>(kUnitRows * value_size);
    base = arena.take<float>(kUnitRows);
    sum = arena.take<float>(kUnitRows * kLanes);
    scores = arena.take<float>(kMostBlockRows * kTileKeys);
    visible = arena.take<Run>(kUnitRows);
    runs = arena.take<Run>(kUnitRows);
  }
};

// The scores of a row as the softmax wants them, and its largest ones, lane by lane. They are stored only if they are not
// `scale` times what is there.
template <bool masked, bool capped>
SPK_INLINE Vec finish_scores(const AttentionProblem& problem, const Run& run, int64_t tile, const Seen& seen, float scale,
                             float* scores) {
  const VisibleColumns visible(run, tile);
  Vec largest = splat(-kInfinity);
  for (int column = seen.first; column < seen.first + seen.vectors * kLanes; column += kLanes) {
    Vec score = load(scores + column) * scale;
    if (capped) score = tanh(score) * (problem.softcap * kLog2E);
    if (masked) score = select(visible.at(column), score, splat(-kInfinity));
    if (capped || masked) store(scores + column, score);
    largest = max(score, largest);
  }
  return largest;
}

// Moves a row's base to its largest score so far, if that exceeds it: what its neighbours see changes no bit of a row.
SPK_INLINE void rebase(Workspace& ws, int64_t row, float largest) {
  const float before = ws.base[row];
  if (!(largest - before > kSlack)) return;
  ws.base[row] = largest;
  const Vec shrink = exp2(splat(before - largest));  // 0 at first: 2^-inf
  store(ws.sum + row * kLanes, load(ws.sum + row * kLanes) * shrink);
  float* output = ws.output + row * ws.value_size;
  for (int64_t d = 0; d < ws.value_size; d += kLanes) store(output + d, load(output + d) * shrink);
}

// A few rows of scores: S becomes P, and the rows' bases and sums go on.
template <bool masked, bool capped>
void softmax(const AttentionProblem& problem, Workspace& ws, int64_t row, int rows, int64_t tile, const Seen& seen,
             float* scores) {
  Vec largest[kTileRows];
  Vec excess = splat(-kInfinity);
  const float scale = score_scale(problem), left_scale = masked || capped ? 1 : scale;
  for (int i = 0; i < rows; ++i) {
    largest[i] = finish_scores<masked, capped>(problem, ws.runs[row + i], tile, seen, scale, scores + i * kTileKeys);
    excess = max(largest[i] - ws.base[row + i], excess);  // NaN where neither has seen a key, and then it is not taken
  }
  if (max_lanes(excess) > kSlack) {
    for (int i = 0; i < rows; ++i) rebase(ws, row + i, max_lanes(largest[i]));
  }
  for (int i = 0; i < rows; ++i) {
    const Vec base = splat(ws.base[row + i] == -kInfinity ? 0 : ws.base[row + i]);
    float* const weights = scores + i * kTileKeys + seen.first;
    Vec total = load(ws.sum + (row + i) * kLanes);
    for (int v = 0; v < seen.vectors; ++v) {
      const Vec weight = exp2(load(weights + v * kLanes) * left_scale - base);
      store(weights + v * kLanes, weight);
      total += weight;
    }
    store(ws.sum + (row + i) * kLanes, total);
  }
}

// A block of rows against a packed tile; the softmax goes over as few rows at a time as a register tile has, of which more
// see all of the same keys.
template <class Products>
SPK_INLINE void attend(const AttentionProblem& problem, Workspace& ws, Products& products, int64_t row, int rows,
                       bool ordered, int64_t tile, int width) {
  const Seen seen = seen_of_tile(ws.runs + row, rows, ordered, tile, width);
  if (seen.vectors == 0) return;
  products.score(row, rows, seen, ws.scores);
  const bool capped = problem.softcap > 0;
  const Blocks parts(rows, kTileRows);
  for (int64_t p = 0; p < parts.blocks; ++p) {
    const int64_t first = parts.start(p);
    const int count = static_cast<int>(parts.start(p + 1) - first);
    const Seen here =
        parts.blocks == 1 ? seen : seen_of_tile(ws.runs + row + first, count, ordered, tile, width);
    float* const scores = ws.scores + first * kTileKeys;
    if (here.vectors > 0) {
      const auto turn = !here.whole ? (capped ? softmax<true, true> : softmax<true, false>)
                                    : (capped ? softmax<false, true> : softmax<false, false>);
      turn(problem, ws, row + first, count, tile, here, scores);
    }
    products.clear_unseen(seen, here, count, scores);
  }
  products.add_values(rows, seen, ws.scores, ws.output + row * ws.value_size);
}

// Rows [first, first + count) of a unit against all keys of a segment that any of them sees.
template <class Products>
void attend_segment(const AttentionProblem& problem, Workspace& ws, Products& products, int64_t first, int64_t count,
                    const Segment& segment) {
  clip_runs(ws.visible, segment, first, count, ws.runs);
  const auto blocks = Products::blocks(count);
  for_each_tile(hull(ws.runs + first, count), [&](int64_t tile, int width) {
    products.take_keys(segment, tile, width);
    for (int64_t b = 0; b < blocks.blocks; ++b) {
      const int64_t row = blocks.start(b);
      const int rows = static_cast<int>(blocks.start(b + 1) - row);
      attend(problem, ws, products, first + row, rows, segment.ordered, tile, width);
    }
  });
}

template <class Products>
void attend_unit(const AttentionProblem& problem, Workspace& ws, const Unit& unit, const Arena& arena) {
  Arena rest = arena;
  Products products(problem, rest);
  products.take_rows(ws.query, unit.rows);
  for_each_segment(problem, unit, [&](int64_t first, int64_t rows, const Segment& segment) {
    attend_segment(problem, ws, products, first, rows, segment);
  });
}

// out and lse of the rows of a unit, from their base, sum and output.
void finish(const AttentionForward& call, const Unit& unit, Workspace& ws) {
  const AttentionProblem& problem = call.problem;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    float &base = ws.base[row], &sum = ws.sum[row];
    float inverse = sum == 0 ? 0 : 1 / sum;  // 0: it saw no key
    if (problem.sinks != nullptr && sum != 0) {
      const float sink = problem.sinks[at.head()] * kLog2E, larger = sink > base ? sink : base;
      const float shrink = exp2(splat(base - larger))[0];
      sum = sum * shrink + (sink == larger ? 1 : exp2(splat(sink - larger))[0]);  // +inf carries all
      base = larger;
      inverse = shrink / sum;
    }
    write_row(problem.dtype, at.address(call.out), problem.value_size, inverse, ws.output + row * ws.value_size);
  });
  for (int64_t i = 0; i < unit.rows; i += kLanes) {  // base and sum are padded to whole vectors
    const Vec sum = load(ws.sum + i);
    const Vec lse = sum > 0.0f ? load(ws.base + i) * kLn2 + log(sum) : sum;  // NaN is not "sees no key"
    store(ws.sum + i, sum == 0.0f ? splat(-kInfinity) : lse);
  }
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    const int64_t first = (at.sequence().batch * problem.heads + at.head()) * call.queries + at.sequence().first_query;
    call.lse[first + at.query()] = ws.sum[row];
  });
}

void forward_unit(const AttentionForward& call, Workspace& ws, const Unit& unit, const Arena& arena) {
  const AttentionProblem& problem = call.problem;
  const float scale = query_scale(problem);
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    read_row(problem.dtype, at.address(problem.query), problem.size, scale, ws.query + row * ws.size);
    ws.base[row] = -kInfinity;
    store(ws.sum + row * kLanes, Vec{});
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(ws.output + row * ws.value_size + d, Vec{});
    ws.visible[row] = visible_run(problem, at.sequence(), at.query());
  });
  with_products(problem, fills_tiles(problem, unit), [&](auto products) {
    attend_unit<typename decltype(products)::Forward>(problem, ws, unit, arena);
  });
  for (int64_t i = 0; i < unit.rows; ++i) ws.sum[i] = sum_lanes(load(ws.sum + i * kLanes));
  if (unit.partial < 0) {
    finish(call, unit, ws);
    return;
  }
  const int64_t stride = ws.value_size + 2;
  for (int64_t i = 0; i < unit.rows; ++i) {
    float* target = call.partial + (unit.partial + i) * stride;
    target[0] = ws.base[i];
    target[1] = ws.sum[i];
    for (int64_t d = 0; d < ws.value_size; d += kLanes) {
      store(target + 2 + d, load(ws.output + i * ws.value_size + d));
    }
  }
}

// The parts of the same rows joined: m = max m_i, and each l_i and O_i times 2^(m_i - m).
void merge_units(const AttentionForward& call, Workspace& ws, const Merge& merge) {
  const AttentionProblem& problem = call.problem;
  const Unit& unit = problem.units[merge.first_unit];
  const int64_t stride = ws.value_size + 2;
  for (int64_t row = 0; row < unit.rows; ++row) {
    float base = -kInfinity, sum = 0;
    const auto part = [&](int64_t u) {
      return call.partial + (problem.units[merge.first_unit + u].partial + row) * stride;
    };
    for (int64_t u = 0; u < merge.units; ++u) base = part(u)[0] > base ? part(u)[0] : base;
    float* output = ws.output + row * ws.value_size;
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(output + d, Vec{});
    for (int64_t u = 0; u < merge.units; ++u) {
      const float* from = part(u);
      if (from[1] == 0) continue;  // it saw no key
      const Vec weight = exp2(splat(from[0] - (base == -kInfinity ? 0 : base)));
      sum += from[1] * weight[0];
      for (int64_t d = 0; d < ws.value_size; d += kLanes) {
        store(output + d, load(output + d) + load(from + 2 + d) * weight);
      }
    }
    ws.base[row] = base;
    ws.sum[row] = sum;
  }
  finish(call, unit, ws);
}

}  // namespace

int64_t attention_forward_workspace(const AttentionProblem& problem) {
  return most_arena_bytes(problem, [&](auto products, Arena& arena) {
    Workspace(problem, arena);
    typename decltype(products)::Forward(problem, arena);
  });
}

void attention_forward(const AttentionForward& call, int thread) {
  const AttentionProblem& problem = call.problem;
  const ProductsOfThread registers;
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(problem, arena);
  for (int64_t u = problem.thread_units[thread]; u < problem.thread_units[thread + 1]; ++u) {
    forward_unit(call, ws, problem.units[u], arena);
  }
}

void attention_merge(const AttentionForward& call, int thread) {
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(call.problem, arena);
  for (int64_t m = thread; m < call.merge_count; m += call.problem.threads) merge_units(call, ws, call.merges[m]);
}

}  // namespace softprompt::SPK_ISA
