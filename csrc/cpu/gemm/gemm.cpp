// Runs a GEMM on all threads, in parts small enough to bound the memory of the packed operands.
#include "cpu/gemm/gemm.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/platform/instruction_set.h"
#include "cpu/platform/integers.h"
#include "cpu/platform/memory.h"
#include "cpu/platform/parallel.h"

namespace softprompt {
namespace {

constexpr int64_t kMaxPartRows = 1024;
constexpr int64_t kMaxPartElements = 640 * kMaxPartRows;  // of A
constexpr int64_t kPartMultiple = 32;                     // sizes of parts are multiples of it

// The size of the parts that `count` is divided into: nearly equal, multiples of kPartMultiple, at most `limit`.
int64_t even_part(int64_t count, int64_t limit) {
  const int64_t parts = max64(1, ceil_div(count, limit));
  return max64(kPartMultiple, round_up(ceil_div(count, parts), kPartMultiple));
}

}  // namespace

bool has_gemm() { return kernels().gemm_multiply != nullptr; }

bool has_fast_gemm() {
#if defined(__x86_64__)
  return has_gemm() && (kernels().has_matrix_unit || !__builtin_cpu_is("intel"));
#else
  return has_gemm();
#endif
}

void run(const Gemm& call) {
  const Kernels& chosen = kernels();
  if (chosen.gemm_multiply == nullptr) {
    throw std::invalid_argument(std::string("the instruction set must be amx or avx512; it is ") + chosen.name);
  }
  const int64_t rows = even_part(call.rows, kMaxPartRows);
  const int64_t depth = even_part(call.depth, min64(kMaxPartElements / rows, chosen.max_gemm_depth));
  GemmPart part = {};
  part.gemm = call;
  part.gemm.rows = std::min(rows, call.rows);
  part.gemm.depth = std::min(depth, call.depth);
  part.workspace_bytes = chosen.gemm_workspace(part.gemm);
  const Scratch<2> scratch({chosen.gemm_packed_a_bytes(part.gemm), call.threads * part.workspace_bytes});
  part.packed_a = scratch[0];
  part.workspace = scratch[1];
  const int64_t b_element_bytes = kBytes[static_cast<int>(call.b_dtype)];
  for (int64_t row = 0; row < call.rows; row += rows) {
    for (int64_t first = 0; first == 0 || first < call.depth; first += depth) {
      const int64_t b_offset = call.b_transposed ? first : first * call.b_stride;
      part.gemm.a = call.a + row * call.a_stride + first;
      part.gemm.b = static_cast<const char*>(call.b) + b_offset * b_element_bytes;
      part.gemm.out = call.out + row * call.out_stride;
      part.gemm.rows = std::min(rows, call.rows - row);
      part.gemm.depth = std::min(depth, call.depth - first);
      part.gemm.accumulate = call.accumulate || first > 0;
      parallel(call.threads, [&](int thread) { chosen.gemm_pack_a(part, thread); });
      parallel(call.threads, [&](int thread) { chosen.gemm_multiply(part, thread); });
    }
  }
}

}  // namespace softprompt
