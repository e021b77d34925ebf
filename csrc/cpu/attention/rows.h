// What forward and backward share: the rows of a unit, tiles of keys, and the part of a tile that some rows see. Tiles
// that no row sees are skipped. Where all rows of a register tile see all columns, no mask is applied.
#pragma once

#include "cpu/attention/visible_keys.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

// columns [size rounded up to lanes, kTileKeys] = the transpose of `count` rows with a stride. Reads whole vectors.
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

// Queries are packed times query_scale. Q Kᵀ times score_scale gives the scores in units of log 2, or divided by the
// softcap if there is one. The product of the two scales is full_scale. The matrix unit needs 16-bit queries unscaled.
SPK_INLINE bool scales_queries(const AttentionProblem& problem) {
#ifdef SPK_AMX
  return problem.dtype == Dtype::float32;
#else
  return (void)problem, true;
#endif
}
SPK_INLINE float full_scale(const AttentionProblem& problem) {
  return problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale * kLog2E;
}
SPK_INLINE float query_scale(const AttentionProblem& problem) {
  return scales_queries(problem) ? full_scale(problem) : 1;
}
SPK_INLINE float score_scale(const AttentionProblem& problem) {
  return scales_queries(problem) ? 1 : full_scale(problem);
}

// Iterates over the rows of a unit.
class RowCursor {
 public:
  RowCursor(const AttentionProblem& problem, const WorkUnit& unit)
      : problem_(problem),
        slice_(problem.slices + unit.first_slice),
        end_(slice_ + unit.slices),
        kv_head_(unit.kv_head) {
    begin_slice();
  }
  bool valid() const { return slice_ != end_; }
  bool begins_slice() const { return rows_left_ == slice_->rows; }
  const Sequence& sequence() const { return *sequence_; }
  int64_t query() const { return query_; }
  int64_t head() const { return kv_head_ * problem_.group + head_; }
  void advance() {
    if (++head_ == problem_.group) head_ = 0, ++query_;
    if (--rows_left_ == 0) ++slice_, begin_slice();
  }
  char* address(const Strided& tensor) const {
    return row_of(tensor, problem_.dtype, sequence_->batch, head(), sequence_->first_query + query_);
  }

 private:
  void begin_slice() {
    if (slice_ == end_) return;
    sequence_ = problem_.sequences + slice_->sequence;
    query_ = slice_->row / problem_.group;
    head_ = slice_->row % problem_.group;
    rows_left_ = slice_->rows;
  }

  const AttentionProblem& problem_;
  const SequenceSlice *slice_, *end_;
  const Sequence* sequence_ = nullptr;
  int64_t kv_head_, query_ = 0, head_ = 0, rows_left_ = 0;
};

// Calls visit(row, cursor) for each row of a unit. Slices begin at multiples of its row_align.
template <class F>
SPK_INLINE void for_each_row(const AttentionProblem& problem, const WorkUnit& unit, F visit) {
  int64_t row = 0;
  for (RowCursor cursor(problem, unit); cursor.valid(); cursor.advance(), ++row) {
    if (cursor.begins_slice()) row = round_up(row, unit.row_align);
    visit(row, cursor);
  }
}

// Prefetches the rows of the next unit during this one. Short sequences have about as many rows as keys, and the rows
// of a group's heads are far apart in memory, so the hardware prefetcher misses most of them.
class RowPrefetcher {
 public:
  // For the rows of the unit after `unit`, if the thread has one.
  RowPrefetcher(const AttentionProblem& problem, int64_t unit, int thread)
      : problem_(problem),
        cursor_(problem, unit + 1 < problem.thread_units[thread + 1] ? problem.units[unit + 1] : WorkUnit{}) {}

  // Adds a tensor to prefetch from, with rows of `size` elements.
  void add(const Strided& tensor, int64_t size) {
    tensors_[count_] = &tensor;
    row_bytes_[count_++] = size * kBytes[static_cast<int>(problem_.dtype)];
  }
  // Prefetches half as many rows as were computed with a tile of keys, so two tiles of keys prefetch all rows.
  void prefetch(int computed_rows) {
    for (int rows = (computed_rows + 1) / 2; rows > 0 && cursor_.valid(); --rows, cursor_.advance()) {
      for (int t = 0; t < count_; ++t) {
        const char* const row = cursor_.address(*tensors_[t]);
        for (int64_t at = 0; at < row_bytes_[t]; at += 64) __builtin_prefetch(row + at, 0, 3);
      }
    }
  }

 private:
  const AttentionProblem& problem_;
  RowCursor cursor_;
  const Strided* tensors_[3];
  int64_t row_bytes_[3];
  int count_ = 0;
};

// The keys at positions [begin, end), from one tensor.
struct KeySource {
  const Strided *key, *value;
  int64_t batch, head, token;  // of the key at `begin`
  int64_t begin, end;
};

// Keys that some rows attend to together: a prompt, own keys, or a prompt followed by own keys.
struct KeySegment {
  KeySource sources[2];
  int count;
  bool ordered;  // the visible ranges of the rows do not decrease, so the first and the last row determine them
  PositionRange positions() const { return {sources[0].begin, sources[count - 1].end}; }
};

SPK_INLINE KeySource prompt_source(const AttentionProblem& problem, const WorkUnit& unit) {
  return {&problem.prompt_key, &problem.prompt_value, unit.prompt,    unit.kv_head,
          unit.prompt_begin,   unit.prompt_begin,     unit.prompt_end};
}

SPK_INLINE KeySource own_source(const AttentionProblem& problem, const WorkUnit& unit, const Sequence& sequence) {
  return {&problem.key,
          &problem.value,
          sequence.batch,
          unit.kv_head,
          sequence.first_key,
          sequence.prompt_length,
          sequence.prompt_length + sequence.key_length};
}

// Calls visit(first row, rows, segment). A single sequence attends to its prompt and its own keys as one segment.
// Several stacked sequences attend to their prompt together, then each to its own keys.
template <class F>
SPK_INLINE void for_each_segment(const AttentionProblem& problem, const WorkUnit& unit, F visit) {
  const KeySource prompt = prompt_source(problem, unit);
  const SequenceSlice* slices = problem.slices + unit.first_slice;
  if (unit.slices == 1 && unit.own) {
    visit(0, slices[0].rows,
          KeySegment{{prompt, own_source(problem, unit, problem.sequences[slices[0].sequence])}, 2, true});
    return;
  }
  visit(0, unit.slices == 1 ? slices[0].rows : unit.rows, KeySegment{{prompt, {}}, 1, unit.slices == 1});
  int64_t row = 0;
  for (int64_t p = 0; p < unit.slices && unit.own; ++p) {
    visit(row, slices[p].rows,
          KeySegment{{own_source(problem, unit, problem.sequences[slices[p].sequence]), {}}, 1, true});
    row = round_up(row + slices[p].rows, unit.row_align);
  }
}

// ranges[i] = the positions of the segment that row i sees; all[i] are all the positions that it sees.
SPK_INLINE void clip_ranges(const PositionRange* all, const KeySegment& segment, int64_t first, int64_t rows,
                            PositionRange* ranges) {
  for (int64_t i = first; i < first + rows; ++i) ranges[i] = intersection(all[i], segment.positions());
}

// The columns [first, end) of a tile of keys that some rows see. vectors * kLanes columns are computed. `unmasked`:
// each row sees all of the computed columns.
struct VisibleSpan {
  int first, end, vectors;
  bool unmasked;
};

SPK_INLINE VisibleSpan visible_span(const PositionRange* ranges, int rows, bool ordered, int64_t tile, int width) {
  int64_t begin = ranges[0].begin, end = ranges[rows - 1].end;                // some row sees
  int64_t begin_of_all = ranges[rows - 1].begin, end_of_all = ranges[0].end;  // every row sees
  for (int i = 0; i < rows && !ordered; ++i) {
    begin = min64(begin, ranges[i].begin);
    end = max64(end, ranges[i].end);
    begin_of_all = max64(begin_of_all, ranges[i].begin);
    end_of_all = min64(end_of_all, ranges[i].end);
  }
  begin = max64(begin - tile, 0);
  end = min64(end - tile, width);
  if (begin >= end) return {0, 0, 0, true};
  const int first = static_cast<int>(begin) / kLanes * kLanes;
  const int vectors = (static_cast<int>(end) - first + kLanes - 1) / kLanes;
  const int64_t computed = tile + first + vectors * kLanes;
  return {first, static_cast<int>(end), vectors, begin_of_all <= tile + first && end_of_all >= computed};
}

// The mask of a row within a tile of keys.
struct ColumnMask {
  IntVec begin, end;
  ColumnMask(const PositionRange& range, int64_t tile)
      : begin(IntVec{} + static_cast<int>(min64(max64(range.begin - tile, 0), kTileKeys))),
        end(IntVec{} + static_cast<int>(min64(max64(range.end - tile, 0), kTileKeys))) {}
  // For the lanes of the vector at `column`.
  IntVec at(int column) const {
    const IntVec lane = lane_index() + column;
    return (lane >= begin) & (lane < end);
  }
};

SPK_INLINE void clear_columns(float* row, int begin, int end) {
  for (int column = begin; column < end; column += kLanes) store(row + column, Vec{});
}

// Calls visit(first, count) for the tiles of a range of positions, each of at most kTileKeys keys.
template <class F>
SPK_INLINE void for_each_tile(const PositionRange& keys, F visit) {
  for (int64_t tile = keys.begin; tile < keys.end; tile += kTileKeys) {
    visit(tile, static_cast<int>(min64(kTileKeys, keys.end - tile)));
  }
}

// The smallest range that covers the positions that the rows see.
SPK_INLINE PositionRange covering_range(const PositionRange* ranges, int64_t rows) {
  PositionRange all = {INT64_MAX, 0};
  for (int64_t i = 0; i < rows; ++i) {
    if (ranges[i].begin >= ranges[i].end) continue;
    all.begin = min64(all.begin, ranges[i].begin);
    all.end = max64(all.end, ranges[i].end);
  }
  return all;
}

// rows [kTileKeys, size rounded up to lanes] = the keys or values of a tile. Rows up to a whole vector are 0.
static void pack_tile(const KeySegment& segment, const Strided* KeySource::* tensor, Dtype dtype, int64_t tile,
                      int width, int64_t size, float* rows) {
  const int64_t stride = round_up(size, kLanes);
  for (int s = 0; s < segment.count; ++s) {
    const KeySource& source = segment.sources[s];
    for (int64_t at = max64(tile, source.begin); at < min64(tile + width, source.end); ++at) {
      const int64_t token = source.token + at - source.begin;
      read_row(dtype, row_of(*(source.*tensor), dtype, source.batch, source.head, token), size, 1.0f,
               rows + (at - tile) * stride);
    }
  }
  for (int64_t i = width * stride; i < round_up(width, kLanes) * stride; i += kLanes) store(rows + i, Vec{});
}

// columns [size rounded up to lanes, kTileKeys] = the transpose of what `pack_tile` packs. It is read in place if
// possible, and packed in `rows` first if not.
static void pack_tile_columns(const KeySegment& segment, const Strided* KeySource::* tensor, Dtype dtype, int64_t tile,
                              int width, int64_t size, float* rows, float* columns) {
  for (int s = 0; s < segment.count && dtype == Dtype::float32 && size % kLanes == 0 && width % kLanes == 0; ++s) {
    const KeySource& source = segment.sources[s];
    if (tile < source.begin || tile + width > source.end) continue;
    const char* first = row_of(*(source.*tensor), dtype, source.batch, source.head, source.token + tile - source.begin);
    transpose_rows(reinterpret_cast<const float*>(first), (source.*tensor)->token, width, size, columns);
    return;
  }
  pack_tile(segment, tensor, dtype, tile, width, size, rows);
  transpose_rows(rows, round_up(size, kLanes), width, size, columns);
}

}  // namespace softprompt::SPK_ISA
