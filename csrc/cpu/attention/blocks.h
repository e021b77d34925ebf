// What the GEMMs of the backward work on: a block of rows, a tile of keys, and the accumulators of their dK and dV.
#pragma once

#include "cpu/attention/rows.h"

namespace softprompt::SPK_ISA {

constexpr int64_t kBlockRows = 96;    // rows whose P and dS exist at a time, 24 KiB each
constexpr int64_t kMaxRowTiles = 16;  // of a block

// A block of rows, divided into row tiles whose rows see about the same keys.
struct RowBlock {
  int64_t row[kMaxRowTiles + 1];   // the first row of each row tile, in the unit
  VisibleSpan span[kMaxRowTiles];  // what each row tile sees of the tile of keys
  int count = 0;                   // of row tiles
  int begin = kTileKeys, end = 0;  // columns that any row tile computes, multiples of `column_multiple`

  template <class Tiles>
  RowBlock(const PositionRange* ranges, const Tiles& tiles, int64_t first_row, int64_t first_tile, int64_t max_tiles,
           bool ordered, int64_t tile, int width, int column_multiple) {
    for (; count < max_tiles && first_tile + count < tiles.blocks; ++count) {
      row[count] = first_row + tiles.start(first_tile + count);
      row[count + 1] = first_row + tiles.start(first_tile + count + 1);
      const VisibleSpan& tile_span = span[count] =
          visible_span(ranges + row[count], static_cast<int>(row[count + 1] - row[count]), ordered, tile, width);
      if (tile_span.vectors == 0) continue;
      begin = tile_span.first < begin ? tile_span.first : begin;
      const int computed = tile_span.first + tile_span.vectors * kLanes;
      end = computed > end ? computed : end;
    }
    if (end == 0) return;
    begin = begin / column_multiple * column_multiple;
    end = static_cast<int>(round_up(end, column_multiple));
  }

  int rows() const { return static_cast<int>(row[count] - row[0]); }
};

// What a unit adds dK and dV to: fp32 [keys, D or Dv rounded up to lanes]; nullptr: not needed.
struct DkDvAccumulator {
  float *dk, *dv;
  int64_t first_token;  // the token of the first key
};

// The accumulators of the columns [begin, end) of a tile of keys. The keys may come from two sources: prompt, own keys.
// for_each calls visit(begin, end, index of the first key in its accumulator, accumulator) for each source.
struct TileAccumulators {
  const KeySegment& segment;
  const DkDvAccumulator (&accumulators)[2];
  int64_t tile, end, begin;
  TileAccumulators(const KeySegment& segment, const DkDvAccumulator (&accumulators)[2], int64_t tile, int64_t end,
                   int64_t begin)
      : segment(segment), accumulators(accumulators), tile(tile), end(end), begin(begin) {}

  template <class F>
  void for_each(F visit) const {
    for (int s = 0; s < segment.count; ++s) {
      const KeySource& source = segment.sources[s];
      const int64_t first_position = max64(source.begin, tile + begin), end_position = min64(source.end, tile + end);
      if (first_position >= end_position || (accumulators[s].dk == nullptr && accumulators[s].dv == nullptr)) continue;
      visit(static_cast<int>(first_position - tile), static_cast<int>(end_position - tile),
            source.token + first_position - source.begin - accumulators[s].first_token, accumulators[s]);
    }
  }
};

}  // namespace softprompt::SPK_ISA
