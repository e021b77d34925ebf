// Dense products on the matrix unit, blocked for the second cache.
//
// Each side is packed into images of tiles (see amx.h), 32 rows or columns - a panel - next to each other. `right`, which
// may be the weight of a language model's head, is packed once, as many panels at a time as fill half of that cache; the
// panels of `left`, the tokens, are packed before that for all threads, and run past what is kept of `right`. So 24 KiB a
// panel and 128 of the depth pass from the third cache to the second while 10 panels of `right` are multiplied with them.
//
// Rows of `right` that lie along the depth become the left side of the tiles, and the product its own transpose: then
// `right` is packed without shuffles either way, and those that transposing needs fall on `left`.
#include "cpu/gemm/gemm.h"

#include "cpu/gemm/amx.h"
#include "cpu/platform/arena.h"
#include "cpu/gemm/micro_kernel.h"
#include "cpu/gemm/kernels.h"
#include "cpu/platform/row_reductions.h"

namespace softprompt::SPK_ISA {

namespace {

constexpr int64_t kPanel = 2 * kTile;
constexpr int64_t kKeptBytes = 1 << 20;
constexpr int64_t kMostSteps = 20;  // of kTileDepth that are kept; the sums of more are added in fp32

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

int64_t panel_bytes(int parts, int64_t steps) { return steps * parts * 2 * kImage; }

struct Shape {
  int64_t rows, columns, steps;        // panels of left and of right, steps of the depth
  int64_t kept_columns, kept_steps;    // at a time, at most

  explicit Shape(const Product& product)
      : rows(ceiling(product.rows, kPanel)),
        columns(ceiling(product.columns, kPanel)),
        steps(ceiling(product.depth, kTileDepth)),
        kept_steps(most(1, ceiling(steps, most(1, ceiling(steps, kMostSteps))))) {
    const int64_t fitting = most(1, kKeptBytes / most(1, panel_bytes(parts_of(product.right_dtype), kept_steps)));
    kept_columns = ceiling(columns, most(1, ceiling(columns, fitting)));
  }
};

struct Workspace {
  char* kept;   // [panels][steps][parts][2 images]
  float* sums;  // [32, 32]

  Workspace(const Product& product, Arena& arena) {
    const Shape shape(product);
    kept = arena.take<char>(most(kKeptBytes, panel_bytes(parts_of(product.right_dtype), shape.kept_steps)));
    sums = arena.take<float>(kPanel * kPanel);
  }
};

// One side as it lies in memory: `count` rows or columns, each of them `depth` elements.
template <class T, bool left_of_tiles, bool along_rows>
struct Side {
  static constexpr int kParts = kPartsOf<T>;
  const T* data;
  int64_t stride, count, depth;

  // Writes the images of a panel for some steps of the depth.
  void pack(int64_t panel, int64_t first_step, int64_t steps, char* images) const {
    for (int64_t s = first_step; s < first_step + steps; ++s) {
      const int deep = static_cast<int>(least(kTileDepth, depth - s * kTileDepth));
      for (int64_t at = panel * kPanel; at < (panel + 1) * kPanel; at += kTile, images += kImage) {
        const int here = static_cast<int>(most(0, least(kTile, count - at)));
        if (here == 0) continue;
        if constexpr (along_rows) {
          pack_along<kParts, !left_of_tiles>(data + at * stride + s * kTileDepth, stride, here, deep, images, 2 * kImage);
        } else {
          pack_down<kParts, left_of_tiles>(data + s * kTileDepth * stride + at, stride, here, deep, images, 2 * kImage);
        }
      }
      images += (kParts - 1) * 2 * kImage;
    }
  }

  int tiles(int64_t panel) const { return count - panel * kPanel > kTile ? 2 : 1; }

  Images images(const char* panel) const { return {panel, kParts * 2 * kImage, 2 * kImage, kImage}; }
};

SPK_INLINE void put_row(float* out, Vec sum, int count, bool accumulate) {
  if (count <= 0) return;
  if (accumulate) sum += load_up_to(out, count);
  put(out, sum, count >= kLanes ? kLanes : count);
}

// The sums [32, 32] of a panel of each side, written or added to out.
template <bool transposed>
void write_sums(const Product& call, const float* sums, int64_t row, int64_t column, bool accumulate) {
  const int rows = static_cast<int>(least(kPanel, call.rows - row * kPanel));
  const int columns = static_cast<int>(least(kPanel, call.columns - column * kPanel));
  float* const out = call.out + row * kPanel * call.out_stride + column * kPanel;
  for (int i = 0; i < rows; i += kTile) {
    for (int j = 0; j < columns; j += kTile) {
      Vec block[kTile];
      SPK_UNROLL for (int k = 0; k < kTile; ++k) {
        block[k] = load(transposed ? sums + (j + k) * kPanel + i : sums + (i + k) * kPanel + j);
      }
      if (transposed) transpose(block);
      for (int k = 0; k < kTile && i + k < rows; ++k) {
        put_row(out + (i + k) * call.out_stride + j, block[k], columns - j, accumulate);
      }
    }
  }
}

// The sides of a product, of which those of `right` that run along the depth are the left side of the tiles.
template <class T, bool transposed>
struct Sides {
  Side<float, !transposed, true> left;
  Side<T, transposed, transposed> right;
  explicit Sides(const Product& product)
      : left{product.left, product.left_stride, product.rows, product.depth},
        right{static_cast<const T*>(product.right), product.right_stride, product.columns, product.depth} {}
};

// visit(sides) with those of a product.
template <class T, class F>
SPK_INLINE void with_sides_of(const Product& product, F visit) {
  if (product.right_transposed) return visit(Sides<T, true>(product));
  visit(Sides<T, false>(product));
}

template <class F>
SPK_INLINE void with_sides(const Product& product, F visit) {
  switch (product.right_dtype) {
    case Dtype::float32: return with_sides_of<float>(product, visit);
    case Dtype::bfloat16: return with_sides_of<BFloat16>(product, visit);
    case Dtype::float16: return with_sides_of<Float16>(product, visit);
  }
}

// The part of a thread: columns where there are enough of them, so that each is packed by one thread.
template <class T, bool transposed>
void multiply(const ProductPart& part, const Sides<T, transposed>& sides, int thread) {
  const Product& product = part.product;
  const Shape shape(product);
  Arena arena(part.workspace + thread * part.workspace_bytes);
  const Workspace ws(product, arena);
  const bool by_columns = shape.columns >= 4 * product.threads || shape.columns >= shape.rows;
  const Share rows = by_columns ? Share{0, shape.rows} : share(shape.rows, thread, product.threads);
  const Share columns = by_columns ? share(shape.columns, thread, product.threads) : Share{0, shape.columns};
  const int64_t left_bytes = panel_bytes(sides.left.kParts, shape.steps);
  const int64_t kept_bytes = panel_bytes(sides.right.kParts, shape.kept_steps);
  for (int64_t step = 0; step == 0 || step < shape.steps; step += shape.kept_steps) {
    const int64_t steps = least(shape.kept_steps, shape.steps - step);
    for (int64_t first = columns.begin; first < columns.end; first += shape.kept_columns) {
      const int64_t count = least(shape.kept_columns, columns.end - first);
      for (int64_t c = 0; c < count; ++c) sides.right.pack(first + c, step, steps, ws.kept + c * kept_bytes);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const Images left = sides.left.images(part.left + r * left_bytes);
        for (int64_t c = 0; c < count; ++c) {
          const Images a = left.at(step * left.step), b = sides.right.images(ws.kept + c * kept_bytes);
          const int tall = sides.left.tiles(r), wide = sides.right.tiles(first + c);
          if constexpr (transposed) {
            multiply_images<kPartsOf<T>, kPartsOf<float>>(wide, tall, steps, b, a, ws.sums, kPanel, false);
          } else {
            multiply_images<kPartsOf<float>, kPartsOf<T>>(tall, wide, steps, a, b, ws.sums, kPanel, false);
          }
          write_sums<transposed>(product, ws.sums, r, first + c, product.accumulate || step > 0);
        }
      }
    }
  }
}

}  // namespace

int64_t product_left_bytes(const Product& part) {
  const Shape shape(part);
  return shape.rows * panel_bytes(kPartsOf<float>, shape.steps);
}

int64_t product_workspace(const Product& part) {
  Arena arena(nullptr);
  Workspace(part, arena);
  return static_cast<int64_t>(arena.end());
}

void product_pack_left(const ProductPart& part, int thread) {
  with_sides(part.product, [&](const auto& sides) {
    const Shape shape(part.product);
    const int64_t bytes = panel_bytes(sides.left.kParts, shape.steps);
    const Share rows = share(shape.rows, thread, part.product.threads);
    for (int64_t r = rows.begin; r < rows.end; ++r) sides.left.pack(r, 0, shape.steps, part.left + r * bytes);
  });
}

void product(const ProductPart& part, int thread) {
  const TileRegisters registers;
  with_sides(part.product, [&](const auto& sides) { multiply(part, sides, thread); });
}

}  // namespace softprompt::SPK_ISA
