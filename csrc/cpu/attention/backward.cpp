// Attention over [prompt ; own tokens], backward, from the saved out and lse of both segments together.
//
// For a block of rows and a tile of keys, with delta = rowsum(dO * out) - dlse of each row,
//
//     P = exp(S - lse)      dS = P * (dO Vᵀ - delta)      dV += Pᵀ dO      dK += scale dSᵀ Q      dQ += scale dS K
//
// A softcap c makes S = c tanh(x / c) and multiplies dS by 1 - tanh². These are five GEMMs, each computed once. dQ of a
// unit's rows stays in the unit's workspace. dK and dV are added to fp32 accumulators that the units of a thread share
// (see KeyGradients). Q is packed times the scale and log2 e (or 1 / c). A complete dK is divided by log2 e (or 1 / c).
#include "cpu/attention/blocks.h"
#include "cpu/attention/dkdv_accumulators.h"
#include "cpu/attention/kernels.h"
#include "cpu/attention/problem.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/tile_gemm.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

namespace {

struct Workspace {
  float *query, *grad_query;        // [kUnitRows, D rounded up to lanes]
  float* grad_out;                  // [kUnitRows, Dv rounded up to lanes]
  float *lse, *delta;               // [kUnitRows]; lse in units of log 2, +inf if the row sees no key
  PositionRange *visible, *ranges;  // [kUnitRows]: what a row sees of all keys, and of those of a segment
  float *weights, *grad_scores;     // [kBlockRows, kTileKeys]: S then P, dO Vᵀ then dS
  int64_t size, value_size;         // D and Dv rounded up to lanes

  Workspace(const AttentionProblem& problem, Arena& arena)
      : size(round_up(problem.size, kLanes)), value_size(round_up(problem.value_size, kLanes)) {
    query = arena.take<float>(kUnitRows * size);
    grad_query = arena.take<float>(kUnitRows * size);
    grad_out = arena.take<float>(kUnitRows * value_size);
    lse = arena.take<float>(kUnitRows);
    delta = arena.take<float>(kUnitRows);
    visible = arena.take<PositionRange>(kUnitRows);
    ranges = arena.take<PositionRange>(kUnitRows);
    weights = arena.take<float>(kBlockRows * kTileKeys);
    grad_scores = arena.take<float>(kBlockRows * kTileKeys);
  }
};

// One row and one tile of keys: scores S become P, and grad dO Vᵀ becomes dS.
template <bool masked, bool capped>
SPK_INLINE void softmax_gradient_row(const AttentionProblem& problem, const PositionRange& range, int64_t tile,
                                     const VisibleSpan& span, float lse, float delta, float* scores, float* grad) {
  const ColumnMask mask(range, tile);
  const float scale = score_scale(problem);
  for (int column = span.first; column < span.first + span.vectors * kLanes; column += kLanes) {
    Vec score = load(scores + column) * scale, slope = {};
    if (capped) {
      const Vec tangent = tanh(score);
      slope = 1.0f - tangent * tangent;
      score = tangent * (problem.softcap * kLog2E);
    }
    if (masked) score = select(mask.at(column), score, splat(-kInfinity));
    const Vec weight = exp2(score - lse);
    Vec gradient = weight * (load(grad + column) - delta);
    if (capped) gradient *= slope;
    store(scores + column, weight);
    store(grad + column, gradient);
  }
}

// P and dS of a block. They are 0 in the columns that a row tile does not compute.
void softmax_gradient(const AttentionProblem& problem, Workspace& ws, const RowBlock& block, int64_t tile,
                      RowPrefetcher& prefetcher) {
  const bool capped = problem.softcap > 0;
  for (int t = 0; t < block.count; ++t) {
    const VisibleSpan& span = block.span[t];
    const int64_t row = block.row[t];
    const int rows = static_cast<int>(block.row[t + 1] - row);
    const int computed = span.first + span.vectors * kLanes;
    float* scores = ws.weights + (row - block.row[0]) * kTileKeys;
    float* grad = ws.grad_scores + (row - block.row[0]) * kTileKeys;
    prefetcher.prefetch(rows);
    const auto row_variant = !span.unmasked
                                 ? (capped ? softmax_gradient_row<true, true> : softmax_gradient_row<true, false>)
                                 : (capped ? softmax_gradient_row<false, true> : softmax_gradient_row<false, false>);
    for (int i = 0; i < rows; ++i) {
      float *score_row = scores + i * kTileKeys, *grad_row = grad + i * kTileKeys;
      row_variant(problem, ws.ranges[row + i], tile, span, ws.lse[row + i], ws.delta[row + i], score_row, grad_row);
      float* const rows_to_clear[] = {score_row, grad_row};
      for (float* cleared_row : rows_to_clear) {
        clear_columns(cleared_row, block.begin, span.vectors > 0 ? span.first : block.end);
        clear_columns(cleared_row, span.vectors > 0 ? computed : block.end, block.end);
      }
    }
  }
}

// Rows [first, first + count) of a unit, and all keys of a segment that any of them sees. dK and dV of each source of
// the segment are added to its accumulator.
template <class TileGemm>
void backward_segment(const AttentionBackward& call, Workspace& ws, TileGemm& gemm, int64_t first, int64_t count,
                      const KeySegment& segment, const DkDvAccumulator (&accumulators)[2], RowPrefetcher& prefetcher) {
  const AttentionProblem& problem = call.problem;
  clip_ranges(ws.visible, segment, first, count, ws.ranges);
  const auto tiles = TileGemm::row_tiles(count);
  for_each_tile(covering_range(ws.ranges + first, count), [&](int64_t tile, int width) {
    gemm.begin_tile(segment, tile, width);
    for (int64_t t = 0; t < tiles.blocks; t += TileGemm::kBlockRowTiles) {
      const RowBlock block(ws.ranges, tiles, first, t, TileGemm::kBlockRowTiles, segment.ordered, tile, width,
                           TileGemm::kColumnMultiple);
      if (block.begin >= block.end) continue;
      gemm.score(block, ws.weights, ws.grad_scores);
      softmax_gradient(problem, ws, block, tile, prefetcher);
      gemm.pad_weights(block, ws.weights, ws.grad_scores);
      if (call.need_query) gemm.add_dq(block, ws.grad_scores, ws.grad_query);
      gemm.add_dkdv(TileAccumulators(segment, accumulators, tile, min64(width, block.end), block.begin), block,
                    ws.weights, ws.grad_scores);
    }
    gemm.end_tile(TileAccumulators(segment, accumulators, tile, width, 0));
  });
}

// Loads Q, dO, lse and delta of a unit's rows, and adds their part of the gradient of the sinks.
void load_rows(const AttentionBackward& call, Workspace& ws, const WorkUnit& unit, double* grad_sinks) {
  const AttentionProblem& problem = call.problem;
  const float scale = query_scale(problem);
  const auto clear_row = [&](int64_t row) {
    for (int64_t d = 0; d < ws.size; d += kLanes) store(ws.query + row * ws.size + d, Vec{});
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(ws.grad_out + row * ws.value_size + d, Vec{});
    ws.lse[row] = kInfinity;
    ws.delta[row] = 0;
  };
  int64_t next = 0;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    for (; next < row; ++next) {  // rows that pad the slice before
      clear_row(next);
      ws.visible[next] = ws.visible[next - 1];
    }
    ++next;
    float *packed = ws.query + row * ws.size, *grad = ws.grad_out + row * ws.value_size;
    ws.visible[row] = visible_range(problem, at.sequence(), at.query());
    const int64_t first = (at.sequence().batch * problem.heads + at.head()) * call.queries + at.sequence().first_query;
    const float lse = call.lse[first + at.query()];
    if (lse == -kInfinity) return clear_row(row);  // it sees no key: its gradient is 0
    read_row(problem.dtype, at.address(problem.query), problem.size, scale, packed);
    read_row(problem.dtype, at.address(call.grad_out), problem.value_size, 1, grad);
    ws.lse[row] = lse * kLog2E;
    ws.delta[row] = dot_row(problem.dtype, at.address(call.out), problem.value_size, grad) -
                    (call.grad_lse == nullptr ? 0 : call.grad_lse[first + at.query()]);
    if (grad_sinks != nullptr) {
      const float sink_weight = exp2(splat((problem.sinks[at.head()] - lse) * kLog2E))[0];
      grad_sinks[at.head()] -= static_cast<double>(sink_weight) * ws.delta[row];
    }
  });
  for (; next < unit.rows; ++next) {
    clear_row(next);
    ws.visible[next] = ws.visible[next - 1];
  }
  for (int64_t i = 0; i < unit.rows * ws.size && call.need_query; i += kLanes) store(ws.grad_query + i, Vec{});
}

void store_grad_query(const AttentionBackward& call, const Workspace& ws, const WorkUnit& unit) {
  const AttentionProblem& problem = call.problem;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    write_row(problem.dtype, at.address(call.grad_query), problem.size, problem.scale, ws.grad_query + row * ws.size);
  });
}

// dK is accumulated from packed queries, which may include the scale. This is the factor that remains for dK.
float key_scale(const AttentionProblem& problem) {
  if (!scales_queries(problem)) return problem.scale;
  return problem.softcap > 0 ? problem.softcap : 1 / kLog2E;
}

template <class TileGemm>
void backward_unit(const AttentionBackward& call, Workspace& ws, const WorkUnit& unit,
                   ThreadAccumulators& prompt_accumulators, ThreadAccumulators& own_accumulators, double* grad_sinks,
                   RowPrefetcher& prefetcher, const Arena& arena) {
  const AttentionProblem& problem = call.problem;
  load_rows(call, ws, unit, grad_sinks);
  Arena rest = arena;
  TileGemm gemm(problem, rest);
  gemm.begin_unit(ws.query, ws.grad_out, unit.rows);
  const DkDvAccumulator prompt_accumulator =
      prompt_accumulators.begin_range({unit.prompt, unit.kv_head, 0, call.prompt_keys}, unit.prompt_shared);
  const SequenceSlice* slice = problem.slices + unit.first_slice;
  for_each_segment(problem, unit, [&](int64_t first, int64_t rows, const KeySegment& segment) {
    DkDvAccumulator accumulators[2] = {prompt_accumulator, {}};
    const bool prompt_only = segment.count == 1 && segment.sources[0].key == &problem.prompt_key;
    if (!prompt_only) {
      const Sequence& sequence = problem.sequences[slice->sequence];
      accumulators[segment.count - 1] = own_accumulators.begin_range(
          {sequence.batch, unit.kv_head, sequence.first_key, sequence.keys}, slice->shared);
      ++slice;
    }
    if (call.need_query) {
      backward_segment(call, ws, gemm, first, rows, segment, accumulators, prefetcher);
    } else {  // only the sources whose gradients are needed
      for (int s = 0; s < segment.count; ++s) {
        const KeySegment part = {{segment.sources[s], {}}, 1, segment.ordered};
        if (accumulators[s].dk || accumulators[s].dv) {
          backward_segment(call, ws, gemm, first, rows, part, {accumulators[s], {}}, prefetcher);
        }
      }
    }
  });
  if (call.need_query) store_grad_query(call, ws, unit);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionProblem& problem) {
  return max_arena_bytes(problem, [&](auto gemm, Arena& arena) {
    Workspace(problem, arena);
    typename decltype(gemm)::Backward(problem, arena);
  });
}

void attention_backward(const AttentionBackward& call, int thread) {
  const AttentionProblem& problem = call.problem;
  const TileGemmThreadState registers;
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(problem, arena);
  ThreadAccumulators prompt_accumulators(problem, call.prompt, thread, key_scale(problem));
  ThreadAccumulators own_accumulators(problem, call.own, thread, key_scale(problem));
  double* grad_sinks = call.grad_sinks == nullptr ? nullptr : call.grad_sinks + thread * problem.heads;
  for (int64_t u = problem.thread_units[thread]; u < problem.thread_units[thread + 1]; ++u) {
    const WorkUnit& unit = problem.units[u];
    RowPrefetcher prefetcher(problem, u, thread);
    prefetcher.add(problem.query, problem.size);
    prefetcher.add(call.grad_out, problem.value_size);
    prefetcher.add(call.out, problem.value_size);
    with_tile_gemm(problem, unit.row_align > 1, [&](auto gemm) {
      backward_unit<typename decltype(gemm)::Backward>(call, ws, unit, prompt_accumulators, own_accumulators,
                                                       grad_sinks, prefetcher, arena);
    });
  }
  prompt_accumulators.complete();
  own_accumulators.complete();
}

void attention_reduce(const AttentionBackward& call, int thread) {
  reduce_shared(call.problem, call.prompt, thread, key_scale(call.problem));
  reduce_shared(call.problem, call.own, thread, key_scale(call.problem));
}

}  // namespace softprompt::SPK_ISA
