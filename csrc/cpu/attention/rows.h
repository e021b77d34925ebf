// What forward and backward do alike: rows, tiles of keys, and which part of a tile a few rows see. Tiles that no row sees
// are never touched, and what all rows of a register tile see pays nothing for the mask.
#pragma once

#include "cpu/attention/visible_keys.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

// columns[size up to kLanes, kTileKeys] = the transpose of `count` rows with a stride, read in whole vectors.
[[maybe_unused]] static void transpose_rows(const float* rows, int64_t stride, int64_t count, int64_t size,
                                            float* columns) {
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec block[kLanes];
      SPK_UNROLL for (int lane = 0; lane < kLanes; ++lane) block[lane] = load(rows + (i + lane) * stride + d);
      transpose(block);
      SPK_UNROLL for (int lane = 0; lane < kLanes; ++lane) store(columns + (d + lane) * kTileKeys + i, block[lane]);
    }
  }
}

// Queries are packed times query_scale, and their products with keys times score_scale are the scores in units of log 2 (or
// over the softcap). The matrix unit wants queries of 16 bits as they are.
SPK_INLINE bool scales_queries(const AttentionProblem& problem) {
#ifdef SPK_AMX
  return problem.dtype == Dtype::float32;
#else
  return (void)problem, true;
#endif
}
SPK_INLINE float whole_scale(const AttentionProblem& problem) {
  return problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale * kLog2E;
}
SPK_INLINE float query_scale(const AttentionProblem& problem) {
  return scales_queries(problem) ? whole_scale(problem) : 1;
}
SPK_INLINE float score_scale(const AttentionProblem& problem) {
  return scales_queries(problem) ? 1 : whole_scale(problem);
}

// Walks over the rows of a unit.
class RowCursor {
 public:
  RowCursor(const AttentionProblem& problem, const Unit& unit)
      : problem_(problem), piece_(problem.pieces + unit.first_piece), end_(piece_ + unit.pieces), kv_head_(unit.kv_head) {
    begin_piece();
  }
  bool valid() const { return piece_ != end_; }
  bool begins_piece() const { return left_ == piece_->rows; }
  const Sequence& sequence() const { return *sequence_; }
  int64_t query() const { return query_; }
  int64_t head() const { return kv_head_ * problem_.group + head_; }
  void advance() {
    if (++head_ == problem_.group) head_ = 0, ++query_;
    if (--left_ == 0) ++piece_, begin_piece();
  }
  char* address(const Strided& tensor) const {
    return row_of(tensor, problem_.dtype, sequence_->batch, head(), sequence_->first_query + query_);
  }

 private:
  void begin_piece() {
    if (piece_ == end_) return;
    sequence_ = problem_.sequences + piece_->sequence;
    query_ = piece_->row / problem_.group;
    head_ = piece_->row % problem_.group;
    left_ = piece_->rows;
  }

  const AttentionProblem& problem_;
  const Piece *piece_, *end_;
  const Sequence* sequence_ = nullptr;
  int64_t kv_head_, query_ = 0, head_ = 0, left_ = 0;
};

// visit(row, cursor) for each row of a unit; pieces begin at multiples of its row_align.
template <class F>
SPK_INLINE void for_each_row(const AttentionProblem& problem, const Unit& unit, F visit) {
  int64_t row = 0;
  for (RowCursor cursor(problem, unit); cursor.valid(); cursor.advance(), ++row) {
    if (cursor.begins_piece()) row = round_up(row, unit.row_align);
    visit(row, cursor);
  }
}

// Fetches rows that a thread reads next while it computes: short sequences have about as many rows as keys, and
// each row of a group's heads lies elsewhere, so that the processor foresees few of them by itself.
class RowsAhead {
 public:
  // Those of the unit after `unit`, if the thread has one.
  RowsAhead(const AttentionProblem& problem, int64_t unit, int thread)
      : problem_(problem),
        cursor_(problem, unit + 1 < problem.thread_units[thread + 1] ? problem.units[unit + 1] : Unit{}) {}

  // In a tensor with rows of `size`.
  void add(const Strided& tensor, int64_t size) {
    tensors_[count_] = &tensor;
    bytes_[count_++] = size * kBytes[static_cast<int>(problem_.dtype)];
  }
  // Half as many as have been computed on with a tile of keys: two tiles fetch all.
  void fetch(int computed) {
    for (int rows = (computed + 1) / 2; rows > 0 && cursor_.valid(); --rows, cursor_.advance()) {
      for (int t = 0; t < count_; ++t) {
        const char* const row = cursor_.address(*tensors_[t]);
        for (int64_t at = 0; at < bytes_[t]; at += 64) __builtin_prefetch(row + at, 0, 3);
      }
    }
  }

 private:
  const AttentionProblem& problem_;
  RowCursor cursor_;
  const Strided* tensors_[3];
  int64_t bytes_[3];
  int count_ = 0;
};

// Keys at the positions [begin, end), in one tensor.
struct Source {
  const Strided *key, *value;
  int64_t batch, head, token;  // of the key at `begin`
  int64_t begin, end;
};

// Keys that some rows look at together: a prompt, own keys, or one after the other.
struct Segment {
  Source sources[2];
  int count;
  bool ordered;  // the runs of these rows go up, so the first and the last say all
  Run positions() const { return {sources[0].begin, sources[count - 1].end}; }
};

SPK_INLINE Source prompt_source(const AttentionProblem& problem, const Unit& unit) {
  return {&problem.prompt_key, &problem.prompt_value, unit.prompt,      unit.kv_head,
          unit.prompt_begin,   unit.prompt_begin,     unit.prompt_end};
}

SPK_INLINE Source own_source(const AttentionProblem& problem, const Unit& unit, const Sequence& sequence) {
  return {&problem.key,       &problem.value,         sequence.batch, unit.kv_head,
          sequence.first_key, sequence.prompt_length, sequence.prompt_length + sequence.key_length};
}

// visit(first row, rows, segment). A single sequence looks at its prompt and its own keys as one row of keys; several
// that are stacked look at their prompt together, and each at its own keys.
template <class F>
SPK_INLINE void for_each_segment(const AttentionProblem& problem, const Unit& unit, F visit) {
  const Source prompt = prompt_source(problem, unit);
  const Piece* pieces = problem.pieces + unit.first_piece;
  if (unit.pieces == 1 && unit.own) {
    visit(0, pieces[0].rows,
          Segment{{prompt, own_source(problem, unit, problem.sequences[pieces[0].sequence])}, 2, true});
    return;
  }
  visit(0, unit.pieces == 1 ? pieces[0].rows : unit.rows, Segment{{prompt, {}}, 1, unit.pieces == 1});
  int64_t row = 0;
  for (int64_t p = 0; p < unit.pieces && unit.own; ++p) {
    visit(row, pieces[p].rows, Segment{{own_source(problem, unit, problem.sequences[pieces[p].sequence]), {}}, 1, true});
    row = round_up(row + pieces[p].rows, unit.row_align);
  }
}

// The runs of a segment's rows, given those of all rows of the unit.
SPK_INLINE void clip_runs(const Run* all, const Segment& segment, int64_t first, int64_t rows, Run* runs) {
  for (int64_t i = first; i < first + rows; ++i) runs[i] = intersection(all[i], segment.positions());
}

// The part of a tile that a few rows see: columns [first, end) of it, of which vectors * kLanes are computed; `whole`
// where each row sees all of those.
struct Seen {
  int first, end, vectors;
  bool whole;
};

SPK_INLINE Seen seen_of_tile(const Run* runs, int rows, bool ordered, int64_t tile, int width) {
  int64_t begin = runs[0].begin, end = runs[rows - 1].end;              // that any row sees
  int64_t begin_of_all = runs[rows - 1].begin, end_of_all = runs[0].end;  // that every row sees
  for (int i = 0; i < rows && !ordered; ++i) {
    begin = least(begin, runs[i].begin);
    end = most(end, runs[i].end);
    begin_of_all = most(begin_of_all, runs[i].begin);
    end_of_all = least(end_of_all, runs[i].end);
  }
  begin = most(begin - tile, 0);
  end = least(end - tile, width);
  if (begin >= end) return {0, 0, 0, true};
  const int first = static_cast<int>(begin) / kLanes * kLanes;
  const int vectors = (static_cast<int>(end) - first + kLanes - 1) / kLanes;
  const int64_t computed = tile + first + vectors * kLanes;
  return {first, static_cast<int>(end), vectors, begin_of_all <= tile + first && end_of_all >= computed};
}

// Columns of a tile that a row sees, as comparisons of vectors want them.
struct VisibleColumns {
  IntVec begin, end;
  VisibleColumns(const Run& run, int64_t tile)
      : begin(IntVec{} + static_cast<int>(least(most(run.begin - tile, 0), kTileKeys))),
        end(IntVec{} + static_cast<int>(least(most(run.end - tile, 0), kTileKeys))) {}
  // Lanes of the vector at `column`.
  IntVec at(int column) const {
    const IntVec lane = lane_index() + column;
    return (lane >= begin) & (lane < end);
  }
};

SPK_INLINE void clear_columns(float* row, int begin, int end) {
  for (int column = begin; column < end; column += kLanes) store(row + column, Vec{});
}

// The tiles of a run of positions, each at most kTileKeys: visit(first, count).
template <class F>
SPK_INLINE void for_each_tile(const Run& keys, F visit) {
  for (int64_t tile = keys.begin; tile < keys.end; tile += kTileKeys) {
    visit(tile, static_cast<int>(least(kTileKeys, keys.end - tile)));
  }
}

// The positions that any of some rows sees.
SPK_INLINE Run hull(const Run* runs, int64_t rows) {
  Run all = {INT64_MAX, 0};
  for (int64_t i = 0; i < rows; ++i) {
    if (runs[i].begin >= runs[i].end) continue;
    all.begin = least(all.begin, runs[i].begin);
    all.end = most(all.end, runs[i].end);
  }
  return all;
}

// rows[kTileKeys, size up to kLanes] = the keys or values at the positions of a tile; 0 after them up to a whole vector.
static void pack_tile(const Segment& segment, const Strided* Source::*tensor, Dtype dtype, int64_t tile, int width,
                      int64_t size, float* rows) {
  const int64_t stride = round_up(size, kLanes);
  for (int s = 0; s < segment.count; ++s) {
    const Source& source = segment.sources[s];
    for (int64_t at = most(tile, source.begin); at < least(tile + width, source.end); ++at) {
      const int64_t token = source.token + at - source.begin;
      read_row(dtype, row_of(*(source.*tensor), dtype, source.batch, source.head, token), size, 1.0f,
               rows + (at - tile) * stride);
    }
  }
  for (int64_t i = width * stride; i < round_up(width, kLanes) * stride; i += kLanes) store(rows + i, Vec{});
}

// columns[size up to kLanes, kTileKeys] = the transpose of what `pack_tile` packs, which goes through `rows` unless it
// can be read where it lies.
static void pack_tile_columns(const Segment& segment, const Strided* Source::*tensor, Dtype dtype, int64_t tile,
                              int width, int64_t size, float* rows, float* columns) {
  for (int s = 0; s < segment.count && dtype == Dtype::float32 && size % kLanes == 0 && width % kLanes == 0; ++s) {
    const Source& source = segment.sources[s];
    if (tile < source.begin || tile + width > source.end) continue;
    const char* first = row_of(*(source.*tensor), dtype, source.batch, source.head, source.token + tile - source.begin);
    transpose_rows(reinterpret_cast<const float*>(first), (source.*tensor)->token, width, size, columns);
    return;
  }
  pack_tile(segment, tensor, dtype, tile, width, size, rows);
  transpose_rows(rows, round_up(size, kLanes), width, size, columns);
}

}  // namespace softprompt::SPK_ISA
