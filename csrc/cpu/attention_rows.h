// What forward and backward do alike: rows, tiles of keys, and which part of a tile a few rows see. Tiles that no row sees
// are never touched, and what all rows of a register tile see pays nothing for the mask.
#pragma once

#include "attention_runs.h"
#include "gemm.h"
#include "pack.h"

namespace softprompt::SPK_ISA {

// Queries are packed times this, so that a product with keys is the score in units of log 2 (or over the softcap).
SPK_INLINE float query_scale(const AttentionProblem& problem) {
  return problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale * kLog2E;
}

// A row of a unit: the piece that it belongs to says the sequence.
template <class F>
SPK_INLINE void for_each_row(const AttentionProblem& problem, const Unit& unit, F visit) {
  int64_t row = 0;
  for (int64_t p = unit.first_piece; p < unit.first_piece + unit.pieces; ++p) {
    const Piece& piece = problem.pieces[p];
    const Sequence& sequence = problem.sequences[piece.sequence];
    int64_t query = piece.row / problem.group, head = piece.row % problem.group;
    for (int64_t i = 0; i < piece.rows; ++i, ++row) {
      visit(row, sequence, query, unit.kv_head * problem.group + head);
      if (++head == problem.group) head = 0, ++query;
    }
  }
}

// The part of a tile that a few rows see: columns [begin, end) of it, of which [first, first + vectors * kLanes) are
// computed; `whole` where each row sees all of those.
struct Seen {
  int first, end, vectors;
  bool whole;
};

SPK_INLINE Seen seen_of_tile(const Run* runs, int rows, int64_t tile, int width) {
  int64_t begin = width, end = 0, begin_of_all = 0, end_of_all = kTileKeys;
  for (int i = 0; i < rows; ++i) {
    const int64_t low = most(runs[i].begin - tile, 0), high = least(runs[i].end - tile, width);
    if (low < high) {
      begin = least(begin, low);
      end = most(end, high);
    }
    begin_of_all = most(begin_of_all, low);
    end_of_all = least(end_of_all, high);
  }
  if (begin >= end) return {0, 0, 0, true};
  const int first = static_cast<int>(begin) / kLanes * kLanes;
  const int vectors = (static_cast<int>(end) - first + kLanes - 1) / kLanes;
  return {first, static_cast<int>(end), vectors, begin_of_all <= first && end_of_all >= first + vectors * kLanes};
}

// Lanes of the vector at column `column` of a tile that a row with this run sees.
SPK_INLINE IntVec visible(const Run& run, int64_t tile, int column) {
  const int64_t base = tile + column;
  const int begin = static_cast<int>(least(most(run.begin - base, 0), kLanes));
  const int end = static_cast<int>(least(most(run.end - base, 0), kLanes));
  const IntVec lane = lane_index();
  return (lane >= begin) & (lane < end);
}

// The tiles of a run of keys, each at most kTileKeys: visit(first key, keys).
template <class F>
SPK_INLINE void for_each_tile(const Run& keys, F visit) {
  for (int64_t tile = keys.begin; tile < keys.end; tile += kTileKeys) {
    visit(tile, static_cast<int>(least(kTileKeys, keys.end - tile)));
  }
}

// The keys that any of some rows sees.
SPK_INLINE Run hull(const Run* runs, int64_t rows) {
  Run all = {INT64_MAX, 0};
  for (int64_t i = 0; i < rows; ++i) {
    if (runs[i].begin >= runs[i].end) continue;
    all.begin = least(all.begin, runs[i].begin);
    all.end = most(all.end, runs[i].end);
  }
  return all;
}

}  // namespace softprompt::SPK_ISA
