// Chooses the GEMM implementation for a unit: fp32 vectors, or the matrix unit if there is one.
#pragma once

#include "cpu/attention/tile_gemm_simd.h"
#ifdef SPK_AMX
#include "cpu/attention/tile_gemm_amx.h"
#endif

namespace softprompt::SPK_ISA {

struct SimdTileGemm {
  using Forward = SimdForward;
  using Backward = SimdBackward;
};

#ifdef SPK_AMX

// `parts`: bf16 parts of Q, K, V and dO. `weight_parts`: of P and dS.
template <int parts, int weight_parts>
struct AmxTileGemm {
  using Forward = AmxForward<parts, weight_parts>;
  using Backward = AmxBackward<parts, weight_parts>;
};

using TileGemmThreadState = TileRegisters;  // what a thread sets up before it computes

template <class F>
SPK_INLINE void with_amx_tile_gemm(Dtype dtype, F visit) {
  switch (dtype) {
    case Dtype::float32: return visit(AmxTileGemm<3, 3>());
    case Dtype::bfloat16: return visit(AmxTileGemm<1, 2>());
    case Dtype::float16: return visit(AmxTileGemm<2, 2>());
  }
}

// Whether the matrix unit is faster in the forward. It needs enough rows: packing keys in parts costs more than in
// fp32.
SPK_INLINE bool prefers_amx(const AttentionProblem& problem, const WorkUnit& unit) {
  return unit.rows >= (problem.dtype == Dtype::float32 ? 24 : 12);
}

#else

struct TileGemmThreadState {
  TileGemmThreadState() {}
};
SPK_INLINE bool prefers_amx(const AttentionProblem&, const WorkUnit&) { return false; }

#endif

// Calls visit(SimdTileGemm or AmxTileGemm).
template <class F>
SPK_INLINE void with_tile_gemm(const AttentionProblem& problem, bool use_amx, F visit) {
#ifdef SPK_AMX
  if (use_amx) return with_amx_tile_gemm(problem.dtype, visit);
#endif
  (void)problem, (void)use_amx;
  visit(SimdTileGemm());
}

// The bytes that build(gemm, arena) takes from an arena, for the implementation that takes the most.
template <class F>
SPK_INLINE int64_t max_arena_bytes(const AttentionProblem& problem, F build) {
  int64_t bytes = 0;
  const auto measure = [&](auto gemm) {
    Arena arena(nullptr);
    build(gemm, arena);
    bytes = bytes < static_cast<int64_t>(arena.end()) ? static_cast<int64_t>(arena.end()) : bytes;
  };
  measure(SimdTileGemm());
#ifdef SPK_AMX
  with_amx_tile_gemm(problem.dtype, measure);
#endif
  (void)problem;
  return bytes;
}

}  // namespace softprompt::SPK_ISA
