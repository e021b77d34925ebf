// Attention over [prompt ; own tokens], backward, from the saved out and lse of both segments together.
//
// For a block of rows and a tile of keys, with delta = rowsum(dO * out) - dlse of each row,
//
//     P = exp(S - lse)      dS = P * (dO Vᵀ - delta)      dV += Pᵀ dO      dK += scale dSᵀ Q      dQ += scale dS K
//
// where a softcap makes S = c tanh(x / c) and multiplies dS by 1 - tanh². Five products, each computed once: dQ of a
// unit's rows stays with the unit, dK and dV are added to fp32 sums that the units of a thread share (see KeySums).
// Q is packed times the scale and log2 e (or 1 / c), which is taken out of dK when a sum is complete.
#include "cpu/attention/problem.h"
#include "cpu/attention/blocks.h"
#include "cpu/attention/tile_gemm.h"
#include "cpu/attention/rows.h"
#include "cpu/attention/dkdv_accumulators.h"
#include "cpu/attention/kernels.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

namespace {

struct Workspace {
  float *query, *grad_query;     // [kUnitRows, D up to lanes]
  float* grad_out;               // [kUnitRows, Dv up to lanes]
  float *lse, *delta;            // [kUnitRows], lse in units of log 2, +inf where the row sees no key
  Run *visible, *runs;           // [kUnitRows], of all keys and of those of a segment
  float *weights, *grad_scores;  // [kBlockRows, kTileKeys]
  int64_t size, value_size;      // D and Dv up to lanes

  Workspace(const AttentionProblem& problem, Arena& arena)
      : size(round_up(problem.size, kLanes)), value_size(round_up(problem.value_size, kLanes)) {
    query = arena.take<float>(kUnitRows * size);
    grad_query = arena.take<float>(kUnitRows * size);
    grad_out = arena.take<float>(kUnitRows * value_size);
    lse = arena.take<float>(kUnitRows);
    delta = arena.take<float>(kUnitRows);
    visible = arena.take<Run>(kUnitRows);
    runs = arena.take<Run>(kUnitRows);
    weights = arena.take<float>(kBlockRows * kTileKeys);
    grad_scores = arena.take<float>(kBlockRows * kTileKeys);
  }
};

// One row of scores and of dO Vᵀ against one tile: they become P and dS.
template <bool masked, bool capped>
SPK_INLINE void gradient_row(const AttentionProblem& problem, const Run& run, int64_t tile, const Seen& seen, float lse,
                             float delta, float* scores, float* grad) {
  const VisibleColumns visible(run, tile);
  const float scale = score_scale(problem);
  for (int column = seen.first; column < seen.first + seen.vectors * kLanes; column += kLanes) {
    Vec score = load(scores + column) * scale, slope = {};
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

// P and dS of a block; 0 where a tile of rows does not look.
void weigh_block(const AttentionProblem& problem, Workspace& ws, const Block& block, int64_t tile, RowsAhead& ahead) {
  const bool capped = problem.softcap > 0;
  for (int t = 0; t < block.count; ++t) {
    const Seen& seen = block.seen[t];
    const int64_t row = block.row[t];
    const int rows = static_cast<int>(block.row[t + 1] - row);
    const int computed = seen.first + seen.vectors * kLanes;
    float* scores = ws.weights + (row - block.row[0]) * kTileKeys;
    float* grad = ws.grad_scores + (row - block.row[0]) * kTileKeys;
    ahead.fetch(rows);
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

// Rows [first, first + count) of a unit against all keys of a segment that any of them sees; the gradients of a source's
// keys are added to its sum.
template <class Products>
void backward_segment(const AttentionBackward& call, Workspace& ws, Products& products, int64_t first, int64_t count,
                      const Segment& segment, const KeySum (&sums)[2], RowsAhead& ahead) {
  const AttentionProblem& problem = call.problem;
  clip_runs(ws.visible, segment, first, count, ws.runs);
  const auto tiles = Products::row_tiles(count);
  for_each_tile(hull(ws.runs + first, count), [&](int64_t tile, int width) {
    products.take_keys(segment, tile, width);
    for (int64_t t = 0; t < tiles.blocks; t += Products::kBlockTiles) {
      const Block block(ws.runs, tiles, first, t, Products::kBlockTiles, segment.ordered, tile, width, Products::kColumns);
      if (block.begin >= block.end) continue;
      products.score(block, ws.weights, ws.grad_scores);
      weigh_block(problem, ws, block, tile, ahead);
      products.take_weights(block, ws.weights, ws.grad_scores);
      if (call.need_query) products.add_grad_query(block, ws.grad_scores, ws.grad_query);
      products.add_grad_keys(KeysOfTile(segment, sums, tile, least(width, block.end), block.begin), block, ws.weights,
                             ws.grad_scores);
    }
    products.finish_keys(KeysOfTile(segment, sums, tile, width, 0));
  });
}

// Packs what a unit's rows need: Q, dO, lse and delta; adds their part of the sinks' gradient.
void load_rows(const AttentionBackward& call, Workspace& ws, const Unit& unit, double* grad_sinks) {
  const AttentionProblem& problem = call.problem;
  const float scale = query_scale(problem);
  const auto clear = [&](int64_t row) {
    for (int64_t d = 0; d < ws.size; d += kLanes) store(ws.query + row * ws.size + d, Vec{});
    for (int64_t d = 0; d < ws.value_size; d += kLanes) store(ws.grad_out + row * ws.value_size + d, Vec{});
    ws.lse[row] = kInfinity;
    ws.delta[row] = 0;
  };
  int64_t next = 0;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    for (; next < row; ++next) {  // rows that fill up the piece before
      clear(next);
      ws.visible[next] = ws.visible[next - 1];
    }
    ++next;
    float *packed = ws.query + row * ws.size, *grad = ws.grad_out + row * ws.value_size;
    ws.visible[row] = visible_run(problem, at.sequence(), at.query());
    const int64_t first = (at.sequence().batch * problem.heads + at.head()) * call.queries + at.sequence().first_query;
    const float lse = call.lse[first + at.query()];
    if (lse == -kInfinity) return clear(row);  // it sees no key, may hold anything, and gives nothing
    read_row(problem.dtype, at.address(problem.query), problem.size, scale, packed);
    read_row(problem.dtype, at.address(call.grad_out), problem.value_size, 1, grad);
    ws.lse[row] = lse * kLog2E;
    ws.delta[row] = dot_row(problem.dtype, at.address(call.out), problem.value_size, grad) -
                    (call.grad_lse == nullptr ? 0 : call.grad_lse[first + at.query()]);
    if (grad_sinks != nullptr) {
      const float share = exp2(splat((problem.sinks[at.head()] - lse) * kLog2E))[0];
      grad_sinks[at.head()] -= static_cast<double>(share) * ws.delta[row];
    }
  });
  for (; next < unit.rows; ++next) {
    clear(next);
    ws.visible[next] = ws.visible[next - 1];
  }
  for (int64_t i = 0; i < unit.rows * ws.size && call.need_query; i += kLanes) store(ws.grad_query + i, Vec{});
}

void store_grad_query(const AttentionBackward& call, const Workspace& ws, const Unit& unit) {
  const AttentionProblem& problem = call.problem;
  for_each_row(problem, unit, [&](int64_t row, const RowCursor& at) {
    write_row(problem.dtype, at.address(call.grad_query), problem.size, problem.scale, ws.grad_query + row * ws.size);
  });
}

// dK is a sum over packed queries, which may carry their scale.
float key_scale(const AttentionProblem& problem) {
  if (!scales_queries(problem)) return problem.scale;
  return problem.softcap > 0 ? problem.softcap : 1 / kLog2E;
}

template <class Products>
void backward_unit(const AttentionBackward& call, Workspace& ws, const Unit& unit, ThreadSums& prompt_sums,
                   ThreadSums& own_sums, double* grad_sinks, RowsAhead& ahead, const Arena& arena) {
  const AttentionProblem& problem = call.problem;
  load_rows(call, ws, unit, grad_sinks);
  Arena rest = arena;
  Products products(problem, rest);
  products.take_rows(ws.query, ws.grad_out, unit.rows);
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
      backward_segment(call, ws, products, first, rows, segment, sums, ahead);
    } else {  // only the keys whose gradients are wanted
      for (int s = 0; s < segment.count; ++s) {
        const Segment part = {{segment.sources[s], {}}, 1, segment.ordered};
        if (sums[s].key || sums[s].value) backward_segment(call, ws, products, first, rows, part, {sums[s], {}}, ahead);
      }
    }
  });
  if (call.need_query) store_grad_query(call, ws, unit);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionProblem& problem) {
  return most_arena_bytes(problem, [&](auto products, Arena& arena) {
    Workspace(problem, arena);
    typename decltype(products)::Backward(problem, arena);
  });
}

void attention_backward(const AttentionBackward& call, int thread) {
  const AttentionProblem& problem = call.problem;
  const ProductsOfThread registers;
  Arena arena(call.workspace + thread * call.workspace_bytes);
  Workspace ws(problem, arena);
  ThreadSums prompt_sums(problem, call.prompt, thread, key_scale(problem));
  ThreadSums own_sums(problem, call.own, thread, key_scale(problem));
  double* grad_sinks = call.grad_sinks == nullptr ? nullptr : call.grad_sinks + thread * problem.heads;
  for (int64_t u = problem.thread_units[thread]; u < problem.thread_units[thread + 1]; ++u) {
    const Unit& unit = problem.units[u];
    RowsAhead ahead(problem, u, thread);
    ahead.add(problem.query, problem.size);
    ahead.add(call.grad_out, problem.value_size);
    ahead.add(call.out, problem.value_size);
    with_products(problem, unit.row_align > 1, [&](auto products) {
      backward_unit<typename decltype(products)::Backward>(call, ws, unit, prompt_sums, own_sums, grad_sinks, ahead, arena);
    });
  }
  prompt_sums.complete();
  own_sums.complete();
}

void attention_fold(const AttentionBackward& call, int thread) {
  fold_shared(call.problem, call.prompt, thread, key_scale(call.problem));
  fold_shared(call.problem, call.own, thread, key_scale(call.problem));
}

}  // namespace softprompt::SPK_ISA
