// Attention over [prompt ; own tokens], forward: one online softmax over both.
//
// Scores are in units of log 2. Each row has a base m and a row sum l. For each tile of keys and each block of rows
//
//     S = Q Kᵀ      P = 2^(S - m)      l += Σ P      O += P V
//
// and at the end out = O / l, lse = ln2 m + log l. A sink adds exp(sink) to l. The base m need not be the row max, only
// near it. When a score exceeds the base by more than kRescaleThreshold, the base becomes the row max m', and l and O
// are multiplied by 2^(m - m'). After the first tile of a row that is rare. One comparison detects it for several rows.
//
// The keys of a tile are packed once for up to kUnitRows rows. S, P and the tile stay in the L1 cache. The GEMMs are
// those of SimdForward, or of AmxForward if there is a matrix unit and the rows fill its tiles.
#include "cpu/attention/kernels.h"
#include "cpu/attention/problem.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tile_gemm.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kMaxBlockRows = 32;
constexpr float kRescaleThreshold = 8;  // weights are at most 2^8, so their sums stay accurate

struct Workspace {
  float *query, *output;            // [kUnitRows, D or Dv rounded up to lanes]
  float *base, *row_sum;            // [kUnitRows], [kUnitRows, kLanes]
  float* scores;                    // [kMaxBlockRows, kTileKeys]
  PositionRange *visible, *ranges;  // [kUnitRows]: what a row sees of all keys, and of those of a segment
  int64_t size, value_size;         // D and Dv rounded up to lanes

  Workspace(const AttentionProblem& problem, Arena& arena)
      : size(round_up(problem.size, kLanes)), value_size(round_up(problem.value_size, kLanes)) {
    query = arena.take<float>(kUnitRows * size);
    output = arena.take<float>(kUnitRows * value_size);
    base = arena.take<float>(kUnitRows);
    row_sum = arena.take<float>(kUnitRows * kLanes);
    scores = arena.take<float>(kMaxBlockRows * kTileKeys);
    visible = arena.take<PositionRange>(kUnitRows);
    ranges = arena.take<PositionRange>(kUnitRows);
  }
};

// Scales, caps and masks the scores of a row, and returns the max of each lane. The scores are stored only if a cap or
// a mask changed them; scaling alone is repeated later.
template <bool masked, bool capped>
SPK_INLINE Vec finish_scores(const AttentionProblem& problem, const PositionRange& range, int64_t tile,
                             const VisibleSpan& span, float scale, float* scores) {
  const ColumnMask mask(range, tile);
  Vec largest = splat(-kInfinity);
  for (int column = span.first; column < span.first + span.vectors * kLanes; column += kLanes) {
    Vec score = load(scores + column) * scale;
    if (capped) score = tanh(score) * (problem.softcap * kLog2E);
    if (masked) score = select(mask.at(column), score, splat(-kInfinity));
    if (capped || masked) store(scores + column, score);
    largest = max(score, largest);
  }
  return largest;
}

// Moves a row's base to its row max, if that exceeds the base by the threshold. The test is made for each row, so a
// row's result does not depend on its neighbours, bit for bit.
SPK_INLINE void update_base(Workspace& ws, int64_t row, float largest) {
  const float old_base = ws.base[row];
  if (!(largest - old_base > kRescaleThreshold)) return;
  ws.base[row] = largest;
  const Vec rescale = exp2(splat(old_base - largest));  // 0 for the first tile: 2^-inf
  store(ws.row_sum + row * kLanes, load(ws.row_sum + row * kLanes) * rescale);
  float* output = ws.output + row * ws.value_size;
  for (int64_t d = 0; d < ws.value_size; d += kLanes) store(output + d, load(output + d) * rescale);
}

// The online softmax of some rows: S becomes P, and the rows' bases and row sums are updated.
template <bool masked, bool capped>
void softmax(const AttentionProblem& problem, Workspace& ws, int64_t row, int rows, int64_t tile,
             const VisibleSpan& span, float* scores) {
  Vec largest[kRegisterRows];
  Vec excess = splat(-kInfinity);
  const float scale = score_scale(problem), remaining_scale = masked || capped ? 1 : scale;
  for (int i = 0; i < rows; ++i) {
    largest[i] = finish_scores<masked, capped>(problem, ws.ranges[row + i], tile, span, scale, scores + i * kTileKeys);
    excess = max(largest[i] - ws.base[row + i], excess);  // NaN if a row has seen no key; max then skips it
  }
  if (max_lanes(excess) > kRescaleThreshold) {
    for (int i = 0; i < rows; ++i) update_base(ws, row + i, max_lanes(largest[i]));
  }
  for (int i = 0; i < rows; ++i) {
    const Vec base = splat(ws.base[row + i] == -kInfinity ? 0 : ws.base[row + i]);
    float* const weights = scores + i * kTileKeys + span.first;
    Vec total = load(ws.row_sum + (row + i) * kLanes);
    for (int v = 0; v < span.vectors; ++v) {
      const Vec weight = exp2(load(weights + v * kLanes) * remaining_scale - base);
      store(weights + v * kLanes, weight);
      total += weight;
    }
    store(ws.row_sum + (row + i) * kLanes, total);
  }
}

// A block of rows times a packed tile of keys. The softmax takes only as many rows at a time as a register tile has:
// small groups more often need no mask.
template <class TileGemm>
SPK_INLINE void attend(const AttentionProblem& problem, Workspace& ws, TileGemm& gemm, int64_t row, int rows,
                       bool ordered, int64_t tile, int width) {
  const VisibleSpan span = visible_span(ws.ranges + row, rows, ordered, tile, width);
  if (span.vectors == 0) return;
  gemm.score(row, rows, span, ws.scores);
  const bool capped = problem.softcap > 0;
  const EvenBlocks row_groups(rows, kRegisterRows);
  for (int64_t g = 0; g < row_groups.blocks; ++g) {
    const int64_t first = row_groups.start(g);
    const int count = static_cast<int>(row_groups.start(g + 1) - first);
    const VisibleSpan part_span =
        row_groups.blocks == 1 ? span : visible_span(ws.ranges + row + first, count, ordered, tile, width);
    float* const scores = ws.scores + first * kTileKeys;
    if (part_span.vectors > 0) {
      const auto softmax_variant = !part_span.unmasked ? (capped ? softmax<true, true> : softmax<true, false>)
                                                       : (capped ? softmax<false, true> : softmax<false, false>);
      softmax_variant(problem, ws, row + first, count, tile, part_span, scores);
    }
    gemm.clear_hidden_weights(span, part_span, count, scores);
  }
  gemm.add_values(rows, span, ws.scores, ws.output + row * ws.value_size);
}

// Rows [first, first + count) of a unit, and all keys of a segment that any of them sees.
template <class TileGemm>
void attend_segment(const AttentionProblem& problem, Workspace& ws, TileGemm& gemm, int64_t first, int64_t count,
                    const KeySegment& segment) {
  clip_ranges(ws.visible, segment, first, count, ws.ranges);
  const auto blocks = TileGemm::blocks(count);
  for_each_tile(covering_range(ws.ranges + first, count), [&](int64_t tile, int width) {
    gemm.begin_tile(segment, tile, width);
    for (int64_t b = 0; b < blocks.blocks; ++b) {
      const int64_t row = blocks.start(b);
      const int rows = static_cast<int>(blocks.start(b + 1) - row);
      attend(problem, ws, gemm, first + row, rows, segment.ordered, tile, width);
    }
  });
}

template <class TileGemm>
void attend_unit(const AttentionProblem& problem, Workspace& ws, const WorkUnit& unit, const Arena& arena) {
  Arena rest = arena;
  TileGemm gemm(problem, rest);
  gemm.begin_unit(ws.query, unit.rows);
  for_each_segment(problem, unit, [&](int64_t first, int64_t rows, const KeySegment& segment) {
    attend_segment(problem, ws, gemm, first, rows, segment);
  });
}

// Writes out and lse of the rows of a unit, from their base, row sum and output.
void write_outputs(const AttentionForward& call, const WorkUnit& unit, Workspace& ws) {
  const AttentionProblem& problem = call.problem;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    float &base = ws.base[row], &sum = ws.row_sum[row];
    float inverse = sum == 0 ? 0 : 1 / sum;  // row sum 0: the row sees no key
    if (problem.sinks != nullptr && sum != 0) {
      const float sink = problem.sinks[at.head()] * kLog2E, larger = sink > base ? sink : base;
      const float rescale = exp2(splat(base - larger))[0];
      sum =
          sum * rescale + (sink == larger ? 1 : exp2(splat(sink - larger))[0]);  // a sink of +inf takes all the weight
      base = larger;
      inverse = rescale / sum;
    }
    write_row(problem.dtype, at.address(call.out), problem.value_size, inverse, ws.output + row * ws.value_size);
  });
  for (int64_t i = 0; i < unit.rows; i += kLanes) {  // base and row_sum are padded to whole vectors
    const Vec sum = load(ws.row_sum + i);
    const Vec lse = sum > 0.0f ? load(ws.base + i) * kLn2 + log(sum) : sum;  // a NaN sum stays NaN
    store(ws.row_sum + i, sum == 0.0f ? splat(-kInfinity) : lse);
  }
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    const int64_t first = (at.sequence().batch * problem.heads + at.head()) * call.queries + at.sequence().first_query;
    call.lse[first + at.query()] = ws.row_sum[row];
  });
}

void forward_unit(const AttentionForward& call, Workspace& ws, const WorkUnit& unit, const Arena& arena) {
  const AttentionProblem& problem = call.problem;
  const float scale = query_scale(problem);
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    read_row(problem.dtype, at.address(problem.query), problem.size, scale, ws.query + row * ws.size);
    ws.base[row] = -kInfinity;
    store(ws.row_sum + row * kLanes, Vec{});
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(ws.output + row * ws.value_size + d, Vec{});
    ws.visible[row] = visible_range(problem, at.sequence(), at.query());
  });
  with_tile_gemm(problem, prefers_amx(problem, unit),
                 [&](auto gemm) { attend_unit<typename decltype(gemm)::Forward>(problem, ws, unit, arena); });
  for (int64_t i = 0; i < unit.rows; ++i) ws.row_sum[i] = sum_lanes(load(ws.row_sum + i * kLanes));
  if (unit.partial_row < 0) {
    write_outputs(call, unit, ws);
    return;
  }
  const int64_t stride = ws.value_size + 2;
  for (int64_t i = 0; i < unit.rows; ++i) {
    float* target = call.partials + (unit.partial_row + i) * stride;
    target[0] = ws.base[i];
    target[1] = ws.row_sum[i];
    for (int64_t d = 0; d < ws.value_size; d += kLanes) {
      store(target + 2 + d, load(ws.output + i * ws.value_size + d));
    }
  }
}

// Combines the split-KV partial results of the same rows: m = max m_i, l = Σ 2^(m_i - m) l_i, O = Σ 2^(m_i - m) O_i.
void combine_splits(const AttentionForward& call, Workspace& ws, const SplitGroup& split) {
  const AttentionProblem& problem = call.problem;
  const WorkUnit& unit = problem.units[split.first_unit];
  const int64_t stride = ws.value_size + 2;
  for (int64_t row = 0; row < unit.rows; ++row) {
    float base = -kInfinity, sum = 0;
    const auto partial = [&](int64_t u) {
      return call.partials + (problem.units[split.first_unit + u].partial_row + row) * stride;
    };
    for (int64_t u = 0; u < split.units; ++u) base = partial(u)[0] > base ? partial(u)[0] : base;
    float* output = ws.output + row * ws.value_size;
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(output + d, Vec{});
    for (int64_t u = 0; u < split.units; ++u) {
      const float* from = partial(u);
      if (from[1] == 0) continue;  // the row sees no key of this part
      const Vec weight = exp2(splat(from[0] - (base == -kInfinity ? 0 : base)));
      sum += from[1] * weight[0];
      for (int64_t d = 0; d < ws.value_size; d += kLanes) {
        store(output + d, load(output + d) + load(from + 2 + d) * weight);
      }
    }
    ws.base[row] = base;
    ws.row_sum[row] = sum;
  }
  write_outputs(call, unit, ws);
}

}  // namespace

int64_t attention_forward_workspace(const AttentionProblem& problem) {
  return max_arena_bytes(problem, [&](auto gemm, Arena& arena) {
    Workspace(problem, arena);
    typename decltype(gemm)::Forward(problem, arena);
  });
}

void attention_forward(const AttentionForward& call, int thread) {
  const AttentionProblem& problem = call.problem;
  const TileGemmThreadState registers;
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(problem, arena);
  for (int64_t u = problem.thread_units[thread]; u < problem.thread_units[thread + 1]; ++u) {
    forward_unit(call, ws, problem.units[u], arena);
  }
}

void attention_combine(const AttentionForward& call, int thread) {
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(call.problem, arena);
  for (int64_t m = thread; m < call.split_group_count; m += call.problem.threads)
    combine_splits(call, ws, call.split_groups[m]);
}

}  // namespace softprompt::SPK_ISA
