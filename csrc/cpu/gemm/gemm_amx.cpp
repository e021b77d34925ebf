// GEMM on the matrix unit, blocked for the L2 cache.
//
// Both operands are packed into tiles (see amx.h), in panels of 32 rows of A or 32 columns of B. B may be the weight of
// a language model's head. It is packed once; as many of its panels as fill half of the L2 cache are packed and kept at
// a time. A holds the tokens. Its panels are packed before, for all threads, and each is multiplied by all panels of B
// that are kept. So for each panel of A and 128 of the depth, 24 KiB move from L3 to L2 while 10 panels of B are
// multiplied by it.
//
// If B is transposed, the tiles compute the transpose of out, with B as the first operand. So B is packed without
// shuffles either way; the shuffles of transposing fall on A.
#include "cpu/gemm/gemm.h"

#include "cpu/gemm/amx.h"
#include "cpu/gemm/kernels.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/platform/arena.h"
#include "cpu/platform/row_reductions.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kPanel = 2 * kAmxTile;
constexpr int64_t kKeptBytes = 1 << 20;  // of B
// Steps of kAmxDepth for which B is kept. If the depth has more, their partial sums are added in fp32.
constexpr int64_t kMaxKeptSteps = 20;

template <class T>
constexpr int kPartsOf = 3;
template <>
constexpr int kPartsOf<BFloat16> = 1;
template <>
constexpr int kPartsOf<Float16> = 2;

int parts_of(Dtype dtype) {
  constexpr int parts[] = {kPartsOf<float>, kPartsOf<BFloat16>, kPartsOf<Float16>};
  return parts[static_cast<int>(dtype)];
}

int64_t panel_bytes(int parts, int64_t steps) { return steps * parts * 2 * kAmxTileBytes; }

struct Shape {
  int64_t rows, columns, steps;      // panels of A, panels of B, steps of the depth
  int64_t kept_columns, kept_steps;  // the most that are kept at a time

  explicit Shape(const Gemm& gemm)
      : rows(ceil_div(gemm.rows, kPanel)),
        columns(ceil_div(gemm.columns, kPanel)),
        steps(ceil_div(gemm.depth, kAmxDepth)),
        kept_steps(max64(1, ceil_div(steps, max64(1, ceil_div(steps, kMaxKeptSteps))))) {
    const int64_t fitting = max64(1, kKeptBytes / max64(1, panel_bytes(parts_of(gemm.b_dtype), kept_steps)));
    kept_columns = ceil_div(columns, max64(1, ceil_div(columns, fitting)));
  }
};

struct Workspace {
  char* kept_b;         // of B: [panels][steps][parts][2 tiles]
  float* accumulators;  // [32, 32]

  Workspace(const Gemm& gemm, Arena& arena) {
    const Shape shape(gemm);
    kept_b = arena.take<char>(max64(kKeptBytes, panel_bytes(parts_of(gemm.b_dtype), shape.kept_steps)));
    accumulators = arena.take<float>(kPanel * kPanel);
  }
};

// An operand as it is in memory: `count` rows of A or columns of B, each of `depth` elements. `as_a`: it is packed as
// the first operand of the tiles. `depth_inner`: the elements along the depth are contiguous.
template <class T, bool as_a, bool depth_inner>
struct Operand {
  static constexpr int kParts = kPartsOf<T>;
  const T* data;
  int64_t stride, count, depth;

  // Packs a panel for some steps of the depth.
  void pack(int64_t panel, int64_t first_step, int64_t steps, char* packed) const {
    for (int64_t s = first_step; s < first_step + steps; ++s) {
      const int step_depth = static_cast<int>(min64(kAmxDepth, depth - s * kAmxDepth));
      for (int64_t at = panel * kPanel; at < (panel + 1) * kPanel; at += kAmxTile, packed += kAmxTileBytes) {
        const int in_tile = static_cast<int>(max64(0, min64(kAmxTile, count - at)));
        if (in_tile == 0) continue;
        if constexpr (depth_inner) {
          pack_depth_inner<kParts, !as_a>(data + at * stride + s * kAmxDepth, stride, in_tile, step_depth, packed,
                                          2 * kAmxTileBytes);
        } else {
          pack_depth_outer<kParts, as_a>(data + s * kAmxDepth * stride + at, stride, in_tile, step_depth, packed,
                                         2 * kAmxTileBytes);
        }
      }
      packed += (kParts - 1) * 2 * kAmxTileBytes;
    }
  }

  int tile_count(int64_t panel) const { return count - panel * kPanel > kAmxTile ? 2 : 1; }

  PackedTiles tiles_of(const char* panel) const {
    return {panel, kParts * 2 * kAmxTileBytes, 2 * kAmxTileBytes, kAmxTileBytes};
  }
};

SPK_INLINE void store_or_add(float* out, Vec sum, int count, bool accumulate) {
  if (count <= 0) return;
  if (accumulate) sum += load_up_to(out, count);
  store_n(out, sum, count >= kLanes ? kLanes : count);
}

// Writes or adds the accumulators [32, 32] of a panel of A and a panel of B to out.
template <bool b_transposed>
void write_accumulators(const Gemm& call, const float* accumulators, int64_t row, int64_t column, bool accumulate) {
  const int rows = static_cast<int>(min64(kPanel, call.rows - row * kPanel));
  const int columns = static_cast<int>(min64(kPanel, call.columns - column * kPanel));
  float* const out = call.out + row * kPanel * call.out_stride + column * kPanel;
  for (int i = 0; i < rows; i += kAmxTile) {
    for (int j = 0; j < columns; j += kAmxTile) {
      Vec block[kAmxTile];
      SPK_UNROLL for (int k = 0; k < kAmxTile; ++k) {
        block[k] = load(b_transposed ? accumulators + (j + k) * kPanel + i : accumulators + (i + k) * kPanel + j);
      }
      if (b_transposed) transpose(block);
      for (int k = 0; k < kAmxTile && i + k < rows; ++k) {
        store_or_add(out + (i + k) * call.out_stride + j, block[k], columns - j, accumulate);
      }
    }
  }
}

// The operands of a GEMM. A transposed B becomes the first operand of the tiles.
template <class T, bool b_transposed>
struct Operands {
  Operand<float, !b_transposed, true> a;
  Operand<T, b_transposed, b_transposed> b;
  explicit Operands(const Gemm& gemm)
      : a{gemm.a, gemm.a_stride, gemm.rows, gemm.depth},
        b{static_cast<const T*>(gemm.b), gemm.b_stride, gemm.columns, gemm.depth} {}
};

// Calls visit(operands).
template <class T, class F>
SPK_INLINE void with_operands_of(const Gemm& gemm, F visit) {
  if (gemm.b_transposed) return visit(Operands<T, true>(gemm));
  visit(Operands<T, false>(gemm));
}

template <class F>
SPK_INLINE void with_operands(const Gemm& gemm, F visit) {
  switch (gemm.b_dtype) {
    case Dtype::float32: return with_operands_of<float>(gemm, visit);
    case Dtype::bfloat16: return with_operands_of<BFloat16>(gemm, visit);
    case Dtype::float16: return with_operands_of<Float16>(gemm, visit);
  }
}

// The work of a thread. Threads divide the columns if there are enough, so that one thread packs each of them.
template <class T, bool b_transposed>
void multiply(const GemmPart& part, const Operands<T, b_transposed>& operands, int thread) {
  const Gemm& gemm = part.gemm;
  const Shape shape(gemm);
  Arena arena(part.workspace + thread * part.workspace_bytes);
  const Workspace ws(gemm, arena);
  const bool by_columns = shape.columns >= 4 * gemm.threads || shape.columns >= shape.rows;
  const ThreadRange rows = by_columns ? ThreadRange{0, shape.rows} : thread_range(shape.rows, thread, gemm.threads);
  const ThreadRange columns =
      by_columns ? thread_range(shape.columns, thread, gemm.threads) : ThreadRange{0, shape.columns};
  const int64_t a_panel_bytes = panel_bytes(operands.a.kParts, shape.steps);
  const int64_t b_panel_bytes = panel_bytes(operands.b.kParts, shape.kept_steps);
  for (int64_t step = 0; step == 0 || step < shape.steps; step += shape.kept_steps) {
    const int64_t steps = min64(shape.kept_steps, shape.steps - step);
    for (int64_t first = columns.begin; first < columns.end; first += shape.kept_columns) {
      const int64_t count = min64(shape.kept_columns, columns.end - first);
      for (int64_t c = 0; c < count; ++c) operands.b.pack(first + c, step, steps, ws.kept_b + c * b_panel_bytes);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const PackedTiles packed_a = operands.a.tiles_of(part.packed_a + r * a_panel_bytes);
        for (int64_t c = 0; c < count; ++c) {
          const PackedTiles a = packed_a.at(step * packed_a.step),
                            b = operands.b.tiles_of(ws.kept_b + c * b_panel_bytes);
          const int row_tiles = operands.a.tile_count(r), column_tiles = operands.b.tile_count(first + c);
          if constexpr (b_transposed) {
            multiply_packed<kPartsOf<T>, kPartsOf<float>>(column_tiles, row_tiles, steps, b, a, ws.accumulators, kPanel,
                                                          false);
          } else {
            multiply_packed<kPartsOf<float>, kPartsOf<T>>(row_tiles, column_tiles, steps, a, b, ws.accumulators, kPanel,
                                                          false);
          }
          write_accumulators<b_transposed>(gemm, ws.accumulators, r, first + c, gemm.accumulate || step > 0);
        }
      }
    }
  }
}

}  // namespace

int64_t gemm_packed_a_bytes(const Gemm& gemm) {
  const Shape shape(gemm);
  return shape.rows * panel_bytes(kPartsOf<float>, shape.steps);
}

int64_t gemm_workspace(const Gemm& gemm) {
  Arena arena(nullptr);
  Workspace(gemm, arena);
  return static_cast<int64_t>(arena.end());
}

void gemm_pack_a(const GemmPart& part, int thread) {
  with_operands(part.gemm, [&](const auto& operands) {
    const Shape shape(part.gemm);
    const int64_t bytes = panel_bytes(operands.a.kParts, shape.steps);
    const ThreadRange rows = thread_range(shape.rows, thread, part.gemm.threads);
    for (int64_t r = rows.begin; r < rows.end; ++r) operands.a.pack(r, 0, shape.steps, part.packed_a + r * bytes);
  });
}

void gemm_multiply(const GemmPart& part, int thread) {
  const TileRegisters registers;
  with_operands(part.gemm, [&](const auto& operands) { multiply(part, operands, thread); });
}

}  // namespace softprompt::SPK_ISA
