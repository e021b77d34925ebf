// Dense products on fp32 vectors, for processors whose AVX-512 the library that PyTorch multiplies by leaves unused.
//
// The lanes of a vector run along the columns of `right` where its rows lie densely, or along the rows of `left` where it
// is `right` that lies along the depth; then the product is computed as its own transpose, as in gemm_amx.cpp. What
// the lanes run along is packed, in panels of as many lanes as a register tile has; the other side is read where it lies,
// an element at a time, or, where it has 16 bits, from a copy in fp32. So of the weight of a language model's head in fp32
// nothing is packed for logits, and each part once for what multiplies it.
#include "cpu/platform/arena.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/kernels.h"
#include "cpu/gemm/pack.h"
#include "cpu/platform/row_reductions.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kPanel = kTileVectors * kLanes;
constexpr int64_t kBlock = 8 * kTileRows;  // rows of the side that is read in place, while a panel is in the cache
static_assert(kBlock % kLanes == 0);
// Of the depth, summed in registers at a time: few enough for sums to keep as many digits as MKL's, and for what is used
// of a panel meanwhile to stay close.
constexpr int64_t kMostDepth = 192;

struct Workspace {
  float *panel, *block, *sums;  // [depth, kPanel], [kBlock, depth] in fp32, [kBlock, kPanel]

  Workspace(const Product& product, Arena& arena) {
    panel = arena.take<float>(product.right_transposed ? 0 : product.depth * kPanel);
    block = arena.take<float>(product.right_dtype == Dtype::float32 ? 0 : kBlock * round_up(product.depth, kLanes));
    sums = arena.take<float>(kBlock * kPanel);
  }
};

// panel [depth, kPanel] = `count` rows of the left side, transposed; anything in the lanes after them.
void pack_transposed(const float* rows, int64_t stride, int64_t count, int64_t depth, float* panel) {
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t d = 0; d < depth; d += kLanes) {
      const int deep = static_cast<int>(least(kLanes, depth - d));
      Vec block[kLanes];
      SPK_UNROLL for (int lane = 0; lane < kLanes; ++lane) {
        const float* const row = rows + (i + lane) * stride + d;
        block[lane] = i + lane >= count ? Vec{} : deep == kLanes ? load(row) : load_part(row, deep);
      }
      transpose(block);
      for (int k = 0; k < deep; ++k) store(panel + (d + k) * kPanel + i, block[k]);
    }
  }
}

// Where an element of the right side is.
SPK_INLINE const char* right_at(const Product& product, int64_t row, int64_t column) {
  return static_cast<const char*>(product.right) +
         (row * product.right_stride + column) * kBytes[static_cast<int>(product.right_dtype)];
}

SPK_INLINE void add_or_put(float* out, Vec sum, int64_t count, bool accumulate) {
  const int lanes = static_cast<int>(least(kLanes, count));
  if (accumulate) sum += lanes == kLanes ? load(out) : load_part(out, lanes);
  put(out, sum, lanes);
}

// out [rows, columns] = or += sums [rows, kPanel].
void write_sums(const float* sums, int64_t rows, int64_t columns, float* out, int64_t stride, bool accumulate) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      add_or_put(out + i * stride + j, load(sums + i * kPanel + j), columns - j, accumulate);
    }
  }
}

// out [columns, rows] = or += the transpose of sums [rows, kPanel].
void write_transposed(const float* sums, int64_t rows, int64_t columns, float* out, int64_t stride, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      Vec block[kLanes];
      SPK_UNROLL for (int k = 0; k < kLanes; ++k) block[k] = load(sums + (i + k) * kPanel + j);
      transpose(block);
      for (int64_t k = 0; k < least(kLanes, columns - j); ++k) {
        add_or_put(out + (j + k) * stride + i, block[k], rows - i, accumulate);
      }
    }
  }
}

// sums [rows, columns up to lanes] = rows [rows, depth] panel.
void multiply_block(const float* rows, int64_t stride, int64_t count, int64_t depth, const float* panel, int64_t columns,
                    float* sums) {
  const Blocks parts(most(depth, 1), kMostDepth);
  for (int64_t part = 0; part < parts.blocks; ++part) {
    const int64_t first = parts.start(part), deep = least(depth, parts.start(part + 1)) - first;
    for (int64_t i = 0; i < count; i += kTileRows) {
      gemm_rows<Layout::rows>(static_cast<int>(least(kTileRows, count - i)), round_up(columns, kLanes), deep,
                              rows + i * stride + first, stride, panel + first * kPanel, kPanel, sums + i * kPanel, kPanel,
                              part > 0);
    }
  }
}

// panel [depth, kPanel] = `count` columns of the right side, 0 after them up to a whole vector.
template <class T>
void pack_columns(const Product& product, int64_t column, int64_t count, float* panel) {
  const T* const first = static_cast<const T*>(product.right) + column;
  for (int64_t d = 0; d < product.depth; ++d) {
    read_row_of(first + d * product.right_stride, count, 1, panel + d * kPanel);
  }
}

// Rows of `right`, which lie along the depth, against the panels of `left`, which are packed for all threads.
void multiply_rows_of_right(const ProductPart& part, Workspace& ws, const Share& rows) {
  const Product& product = part.product;
  const float* const panels = reinterpret_cast<const float*>(part.left);
  for (int64_t row = rows.begin; row < rows.end; row += kBlock) {
    const int64_t count = least(kBlock, rows.end - row);
    const float* block = reinterpret_cast<const float*>(right_at(product, row, 0));
    int64_t stride = product.right_stride;
    if (product.right_dtype != Dtype::float32) {
      block = ws.block, stride = round_up(product.depth, kLanes);
      for (int64_t i = 0; i < count; ++i) {
        read_row(product.right_dtype, right_at(product, row + i, 0), product.depth, 1, ws.block + i * stride);
      }
    }
    for (int64_t token = 0; token < product.rows; token += kPanel) {
      const int64_t tokens = least(kPanel, product.rows - token);
      multiply_block(block, stride, count, product.depth, panels + token * product.depth, tokens, ws.sums);
      write_transposed(ws.sums, count, tokens, product.out + token * product.out_stride + row, product.out_stride,
                       product.accumulate);
    }
  }
}

// Columns of `right`, a panel at a time, against all rows of `left`.
void multiply_columns_of_right(const ProductPart& part, Workspace& ws, const Share& columns) {
  const Product& product = part.product;
  for (int64_t column = columns.begin; column < columns.end; column += kPanel) {
    const int64_t count = least(kPanel, columns.end - column);
    switch (product.right_dtype) {
      case Dtype::float32: pack_columns<float>(product, column, count, ws.panel); break;
      case Dtype::bfloat16: pack_columns<BFloat16>(product, column, count, ws.panel); break;
      case Dtype::float16: pack_columns<Float16>(product, column, count, ws.panel); break;
    }
    for (int64_t row = 0; row < product.rows; row += kBlock) {
      const int64_t rows = least(kBlock, product.rows - row);
      multiply_block(product.left + row * product.left_stride, product.left_stride, rows, product.depth, ws.panel, count,
                     ws.sums);
      write_sums(ws.sums, rows, count, product.out + row * product.out_stride + column, product.out_stride,
                 product.accumulate);
    }
  }
}

}  // namespace

int64_t product_left_bytes(const Product& part) {
  return part.right_transposed ? round_up(part.rows, kPanel) * part.depth * static_cast<int64_t>(sizeof(float)) : 0;
}

int64_t product_workspace(const Product& part) {
  Arena arena(nullptr);
  Workspace(part, arena);
  return static_cast<int64_t>(arena.end());
}

void product_pack_left(const ProductPart& part, int thread) {
  const Product& product = part.product;
  if (!product.right_transposed) return;
  const Share panels = share(ceiling(product.rows, kPanel), thread, product.threads);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t row = panel * kPanel;
    pack_transposed(product.left + row * product.left_stride, product.left_stride, least(kPanel, product.rows - row),
                    product.depth, reinterpret_cast<float*>(part.left) + row * product.depth);
  }
}

// The part of a thread: columns, in whole vectors.
void product(const ProductPart& part, int thread) {
  const Product& product = part.product;
  Arena arena(part.workspace + thread * part.workspace_bytes);
  Workspace ws(product, arena);
  const Share vectors = share(ceiling(product.columns, kLanes), thread, product.threads);
  const Share columns = {vectors.begin * kLanes, least(vectors.end * kLanes, product.columns)};
  if (product.right_transposed) {
    multiply_rows_of_right(part, ws, columns);
  } else {
    multiply_columns_of_right(part, ws, columns);
  }
}

}  // namespace softprompt::SPK_ISA
