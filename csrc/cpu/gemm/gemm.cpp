// Dense products on all threads, in parts small enough for what is packed of them to take a bounded memory.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/platform/integers.h"
#include "cpu/platform/instruction_set.h"
#include "cpu/platform/memory.h"
#include "cpu/platform/parallel.h"
#include "cpu/gemm/gemm.h"

namespace softprompt {
namespace {

constexpr int64_t kMostRows = 1024;
constexpr int64_t kMostElements = 640 * kMostRows;  // of the left side of a part
constexpr int64_t kGrain = 32;                      // parts are multiples of it

// `count` in parts of nearly equal size, multiples of kGrain, of at most `limit`.
int64_t even_part(int64_t count, int64_t limit) {
  const int64_t parts = most(1, ceiling(count, limit));
  return most(kGrain, round_up(ceiling(count, parts), kGrain));
}

}  // namespace

bool has_products() { return kernels().product != nullptr; }

bool has_fast_products() {
#if defined(__x86_64__)
  return has_products() && (kernels().has_matrix_unit || !__builtin_cpu_is("intel"));
#else
  return has_products();
#endif
}

void run(const Product& call) {
  const Kernels& chosen = kernels();
  if (chosen.product == nullptr) {
    throw std::invalid_argument(std::string("the instruction set must be amx or avx512; it is ") + chosen.name);
  }
  const int64_t rows = even_part(call.rows, kMostRows);
  const int64_t depth = even_part(call.depth, least(kMostElements / rows, chosen.most_product_depth));
  ProductPart part = {};
  part.product = call;
  part.product.rows = std::min(rows, call.rows);
  part.product.depth = std::min(depth, call.depth);
  part.workspace_bytes = chosen.product_workspace(part.product);
  const Scratch<2> scratch({chosen.product_left_bytes(part.product), call.threads * part.workspace_bytes});
  part.left = scratch[0];
  part.workspace = scratch[1];
  const int64_t element = kBytes[static_cast<int>(call.right_dtype)];
  for (int64_t row = 0; row < call.rows; row += rows) {
    for (int64_t deep = 0; deep == 0 || deep < call.depth; deep += depth) {
      const int64_t skipped = call.right_transposed ? deep : deep * call.right_stride;
      part.product.left = call.left + row * call.left_stride + deep;
      part.product.right = static_cast<const char*>(call.right) + skipped * element;
      part.product.out = call.out + row * call.out_stride;
      part.product.rows = std::min(rows, call.rows - row);
      part.product.depth = std::min(depth, call.depth - deep);
      part.product.accumulate = call.accumulate || deep > 0;
      parallel(call.threads, [&](int thread) { chosen.product_pack_left(part, thread); });
      parallel(call.threads, [&](int thread) { chosen.product(part, thread); });
    }
  }
}

}  // namespace softprompt
