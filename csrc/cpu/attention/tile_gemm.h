// Which products the rows of a unit take: those of vectors, or those of the matrix unit where there is one.
#pragma once

#include "cpu/attention/tile_gemm_simd.h"
#ifdef SPK_AMX
#include "cpu/attention/tile_gemm_amx.h"
#endif

namespace softprompt::SPK_ISA {

struct VectorProducts {
  using Forward = VectorForward;
  using Backward = VectorBackward;
};

#ifdef SPK_AMX

template <int parts, int weight_parts>
struct TileProducts {
  using Forward = TileForward<parts, weight_parts>;
  using Backward = TileBackward<parts, weight_parts>;
};

using ProductsOfThread = TileRegisters;

template <class F>
SPK_INLINE void with_tile_products(Dtype dtype, F visit) {
  switch (dtype) {
    case Dtype::float32: return visit(TileProducts<3, 3>());
    case Dtype::bfloat16: return visit(TileProducts<1, 2>());
    case Dtype::float16: return visit(TileProducts<2, 2>());
  }
}

// Rows of a unit from which on tiles are faster in the forward: packing keys in parts costs more than packing them in fp32.
SPK_INLINE bool fills_tiles(const AttentionProblem& problem, const Unit& unit) {
  return unit.rows >= (problem.dtype == Dtype::float32 ? 24 : 12);
}

#else

struct ProductsOfThread {
  ProductsOfThread() {}
};
SPK_INLINE bool fills_tiles(const AttentionProblem&, const Unit&) { return false; }

#endif

// visit(products) with the kind that `tiles` tells.
template <class F>
SPK_INLINE void with_products(const AttentionProblem& problem, bool tiles, F visit) {
#ifdef SPK_AMX
  if (tiles) return with_tile_products(problem.dtype, visit);
#endif
  (void)problem, (void)tiles;
  visit(VectorProducts());
}

// The bytes of an arena that suffice for lay_out(products, arena), whatever a unit takes.
template <class F>
SPK_INLINE int64_t most_arena_bytes(const AttentionProblem& problem, F lay_out) {
  int64_t bytes = 0;
  const auto measure = [&](auto products) {
    Arena arena(nullptr);
    lay_out(products, arena);
    bytes = bytes < static_cast<int64_t>(arena.end()) ? static_cast<int64_t>(arena.end()) : bytes;
  };
  measure(VectorProducts());
#ifdef SPK_AMX
  with_tile_products(problem.dtype, measure);
#endif
  (void)problem;
  return bytes;
}

}  // namespace softprompt::SPK_ISA
