// GEMM on fp32 vectors, for processors whose AVX-512 is not used by the library that PyTorch calls.
//
// If B is not transposed, the lanes of a vector run along its columns. If it is, they run along the rows of A, and the
// transpose of out is computed, as in gemm_amx.cpp. The operand along whose rows or columns the lanes run is packed, in
// panels as wide as a register tile. The other operand is read in place, element by element, or from an fp32 copy if it
// has 16 bits. So for logits nothing of a language model's fp32 head weight is packed, and for the GEMM with
// the gradient of the logits each part of the weight is packed once.
#include "cpu/gemm/kernels.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/pack.h"
#include "cpu/platform/arena.h"
#include "cpu/platform/row_reductions.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kPanel = kRegisterVectors * kLanes;
constexpr int64_t kBlock = 8 * kRegisterRows;  // rows of the operand read in place that reuse a panel in the cache
static_assert(kBlock % kLanes == 0);
// The depth that is summed in registers at a time. It is small enough for sums to be as accurate as MKL's, and for this
// part of a panel to stay in the nearest cache.
constexpr int64_t kMaxRegisterDepth = 192;

struct Workspace {
  float *panel, *block, *accumulators;  // [depth, kPanel], [kBlock, depth] in fp32, [kBlock, kPanel]

  Workspace(const Gemm& gemm, Arena& arena) {
    panel = arena.take<float>(gemm.b_transposed ? 0 : gemm.depth * kPanel);
    block = arena.take<float>(gemm.b_dtype == Dtype::float32 ? 0 : kBlock * round_up(gemm.depth, kLanes));
    accumulators = arena.take<float>(kBlock * kPanel);
  }
};

// panel [depth, kPanel] = the transpose of `count` rows of A. Columns after them hold arbitrary numbers.
void pack_a_panel(const float* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t d = 0; d < depth; d += kLanes) {
      const int chunk_depth = static_cast<int>(min64(kLanes, depth - d));
      Vec block[kLanes];
      SPK_UNROLL for (int lane = 0; lane < kLanes; ++lane) {
        const float* const row = rows + (i + lane) * stride + d;
        block[lane] = i + lane >= count ? Vec{} : chunk_depth == kLanes ? load(row) : load_part(row, chunk_depth);
      }
      transpose(block);
      for (int k = 0; k < chunk_depth; ++k) store(panel + (d + k) * kPanel + i, block[k]);
    }
  }
}

// The address of element (row, column) of the stored B.
SPK_INLINE const char* b_at(const Gemm& gemm, int64_t row, int64_t column) {
  return static_cast<const char*>(gemm.b) + (row * gemm.b_stride + column) * kBytes[static_cast<int>(gemm.b_dtype)];
}

SPK_INLINE void store_or_add(float* out, Vec sum, int64_t count, bool accumulate) {
  const int lanes = static_cast<int>(min64(kLanes, count));
  if (accumulate) sum += lanes == kLanes ? load(out) : load_part(out, lanes);
  store_n(out, sum, lanes);
}

// out [rows, columns] = or += accumulators [rows, kPanel].
void write_accumulators(const float* accumulators, int64_t rows, int64_t columns, float* out, int64_t stride,
                        bool accumulate) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      store_or_add(out + i * stride + j, load(accumulators + i * kPanel + j), columns - j, accumulate);
    }
  }
}

// out [columns, rows] = or += the transpose of accumulators [rows, kPanel].
void write_transposed(const float* accumulators, int64_t rows, int64_t columns, float* out, int64_t stride,
                      bool accumulate) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      Vec block[kLanes];
      SPK_UNROLL for (int k = 0; k < kLanes; ++k) block[k] = load(accumulators + (i + k) * kPanel + j);
      transpose(block);
      for (int64_t k = 0; k < min64(kLanes, columns - j); ++k) {
        store_or_add(out + (j + k) * stride + i, block[k], rows - i, accumulate);
      }
    }
  }
}

// accumulators [count, columns rounded up to lanes] = rows [count, depth] panel [depth, columns].
void multiply_block(const float* rows, int64_t stride, int64_t count, int64_t depth, const float* panel,
                    int64_t columns, float* accumulators) {
  const EvenBlocks chunks(max64(depth, 1), kMaxRegisterDepth);
  for (int64_t chunk = 0; chunk < chunks.blocks; ++chunk) {
    const int64_t first = chunks.start(chunk), chunk_depth = min64(depth, chunks.start(chunk + 1)) - first;
    for (int64_t i = 0; i < count; i += kRegisterRows) {
      gemm_rows<Layout::row_major>(static_cast<int>(min64(kRegisterRows, count - i)), round_up(columns, kLanes),
                                   chunk_depth, rows + i * stride + first, stride, panel + first * kPanel, kPanel,
                                   accumulators + i * kPanel, kPanel, chunk > 0);
    }
  }
}

// panel [depth, kPanel] = `count` columns of B, then 0 up to a whole vector.
template <class T>
void pack_b_panel(const Gemm& gemm, int64_t column, int64_t count, float* panel) {
  const T* const first = static_cast<const T*>(gemm.b) + column;
  for (int64_t d = 0; d < gemm.depth; ++d) {
    read_row_of(first + d * gemm.b_stride, count, 1, panel + d * kPanel);
  }
}

// Rows of a transposed B, read in place, times the panels of A, which are packed for all threads.
void multiply_transposed_b(const GemmPart& part, Workspace& ws, const ThreadRange& b_rows) {
  const Gemm& gemm = part.gemm;
  const float* const panels = reinterpret_cast<const float*>(part.packed_a);
  for (int64_t b_row = b_rows.begin; b_row < b_rows.end; b_row += kBlock) {
    const int64_t count = min64(kBlock, b_rows.end - b_row);
    const float* block = reinterpret_cast<const float*>(b_at(gemm, b_row, 0));
    int64_t stride = gemm.b_stride;
    if (gemm.b_dtype != Dtype::float32) {
      block = ws.block, stride = round_up(gemm.depth, kLanes);
      for (int64_t i = 0; i < count; ++i) {
        read_row(gemm.b_dtype, b_at(gemm, b_row + i, 0), gemm.depth, 1, ws.block + i * stride);
      }
    }
    for (int64_t a_row = 0; a_row < gemm.rows; a_row += kPanel) {
      const int64_t a_rows = min64(kPanel, gemm.rows - a_row);
      multiply_block(block, stride, count, gemm.depth, panels + a_row * gemm.depth, a_rows, ws.accumulators);
      write_transposed(ws.accumulators, count, a_rows, gemm.out + a_row * gemm.out_stride + b_row, gemm.out_stride,
                       gemm.accumulate);
    }
  }
}

// Columns of B, packed one panel at a time, times all rows of A, read in place.
void multiply_b(const GemmPart& part, Workspace& ws, const ThreadRange& columns) {
  const Gemm& gemm = part.gemm;
  for (int64_t column = columns.begin; column < columns.end; column += kPanel) {
    const int64_t count = min64(kPanel, columns.end - column);
    switch (gemm.b_dtype) {
      case Dtype::float32: pack_b_panel<float>(gemm, column, count, ws.panel); break;
      case Dtype::bfloat16: pack_b_panel<BFloat16>(gemm, column, count, ws.panel); break;
      case Dtype::float16: pack_b_panel<Float16>(gemm, column, count, ws.panel); break;
    }
    for (int64_t row = 0; row < gemm.rows; row += kBlock) {
      const int64_t rows = min64(kBlock, gemm.rows - row);
      multiply_block(gemm.a + row * gemm.a_stride, gemm.a_stride, rows, gemm.depth, ws.panel, count, ws.accumulators);
      write_accumulators(ws.accumulators, rows, count, gemm.out + row * gemm.out_stride + column, gemm.out_stride,
                         gemm.accumulate);
    }
  }
}

}  // namespace

int64_t gemm_packed_a_bytes(const Gemm& gemm) {
  return gemm.b_transposed ? round_up(gemm.rows, kPanel) * gemm.depth * static_cast<int64_t>(sizeof(float)) : 0;
}

int64_t gemm_workspace(const Gemm& gemm) {
  Arena arena(nullptr);
  Workspace(gemm, arena);
  return static_cast<int64_t>(arena.end());
}

void gemm_pack_a(const GemmPart& part, int thread) {
  const Gemm& gemm = part.gemm;
  if (!gemm.b_transposed) return;
  const ThreadRange panels = thread_range(ceil_div(gemm.rows, kPanel), thread, gemm.threads);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t row = panel * kPanel;
    pack_a_panel(gemm.a + row * gemm.a_stride, gemm.a_stride, min64(kPanel, gemm.rows - row), gemm.depth,
                 reinterpret_cast<float*>(part.packed_a) + row * gemm.depth);
  }
}

// The work of a thread: some columns of out, in whole vectors.
void gemm_multiply(const GemmPart& part, int thread) {
  const Gemm& gemm = part.gemm;
  Arena arena(part.workspace + thread * part.workspace_bytes);
  Workspace ws(gemm, arena);
  const ThreadRange vectors = thread_range(ceil_div(gemm.columns, kLanes), thread, gemm.threads);
  const ThreadRange columns = {vectors.begin * kLanes, min64(vectors.end * kLanes, gemm.columns)};
  if (gemm.b_transposed) {
    multiply_transposed_b(part, ws, columns);
  } else {
    multiply_b(part, ws, columns);
  }
}

}  // namespace softprompt::SPK_ISA
