// What the products of the backward work on: a block of rows against a tile of keys, and where the gradients of keys go.
#pragma once

#include "cpu/attention/rows.h"

namespace softprompt::SPK_ISA {

constexpr int64_t kBlockRows = 96;     // rows whose P and dS exist at a time: each 24 KiB
constexpr int64_t kMostRowTiles = 16;  // of a block

// A block of rows, in tiles of rows that see about the same keys.
struct Block {
  int64_t row[kMostRowTiles + 1];  // first row of each tile of rows, in the unit
  Seen seen[kMostRowTiles];
  int count = 0;
  int begin = kTileKeys, end = 0;  // columns that any of them computes, multiples of `columns`

  template <class Tiles>
  Block(const Run* runs, const Tiles& tiles, int64_t first_row, int64_t first_tile, int64_t most_tiles, bool ordered,
        int64_t tile, int width, int columns) {
    for (; count < most_tiles && first_tile + count < tiles.blocks; ++count) {
      row[count] = first_row + tiles.start(first_tile + count);
      row[count + 1] = first_row + tiles.start(first_tile + count + 1);
      const Seen& found = seen[count] =
          seen_of_tile(runs + row[count], static_cast<int>(row[count + 1] - row[count]), ordered, tile, width);
      if (found.vectors == 0) continue;
      begin = found.first < begin ? found.first : begin;
      const int computed = found.first + found.vectors * kLanes;
      end = computed > end ? computed : end;
    }
    if (end == 0) return;
    begin = begin / columns * columns;
    end = static_cast<int>(round_up(end, columns));
  }

  int rows() const { return static_cast<int>(row[count] - row[0]); }
};

// Where a unit adds to: [keys, D up to lanes] and [keys, Dv up to lanes], from the key that is `first_token` of its
// tensor on; nullptr: not needed.
struct KeySum {
  float *key, *value;
  int64_t first_token;
};

// The columns [begin, end) of a tile, by the source of their keys and the sum of their gradients: visit(begin, end, index
// of the first key in the sum, sum).
struct KeysOfTile {
  const Segment& segment;
  const KeySum (&sums)[2];
  int64_t tile, end, begin;
  KeysOfTile(const Segment& segment, const KeySum (&sums)[2], int64_t tile, int64_t end, int64_t begin)
      : segment(segment), sums(sums), tile(tile), end(end), begin(begin) {}

  template <class F>
  void for_each(F visit) const {
    for (int s = 0; s < segment.count; ++s) {
      const Source& source = segment.sources[s];
      const int64_t from = most(source.begin, tile + begin), to = least(source.end, tile + end);
      if (from >= to || (sums[s].key == nullptr && sums[s].value == nullptr)) continue;
      visit(static_cast<int>(from - tile), static_cast<int>(to - tile),
            source.token + from - source.begin - sums[s].first_token, sums[s]);
    }
  }
};

}  // namespace softprompt::SPK_ISA
