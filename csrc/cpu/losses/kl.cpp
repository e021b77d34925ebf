// Runs the loss kernels on all threads, with the instruction set that was chosen.
#include "cpu/losses/kl.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/platform/instruction_set.h"
#include "cpu/platform/memory.h"
#include "cpu/platform/parallel.h"

namespace softprompt {

void run(const KlRows& call) {
  const Kernels& chosen = kernels();
  parallel(call.threads, [&](int thread) { chosen.kl_rows(call, thread); });
}

void run(const KlLogits& call) {
  const Kernels& chosen = kernels();
  KlLogits with_workspace = call;
  with_workspace.threads = static_cast<int>(std::min<int64_t>(call.threads, std::max<int64_t>(call.rows, 1)));
  const Scratch<1> scratch({int64_t{sizeof(float)} * 2 * with_workspace.threads * call.vocab});
  if (call.gradient != nullptr && call.gradient_stride == call.columns) {
    const int64_t element = kBytes[static_cast<int>(call.student_dtype)];
    prefer_large_pages(call.gradient, call.rows * call.columns * element);
  }
  with_workspace.workspace = reinterpret_cast<float*>(scratch[0]);
  parallel(with_workspace.threads, [&](int thread) { chosen.kl_logits(with_workspace, thread); });
}

void run(const ExpectationRows& call) {
  const Kernels& chosen = kernels();
  parallel(call.threads, [&](int thread) { chosen.expectation_rows(call, thread); });
}

void run(const KlTile& call) {
  if (call.divergence != Divergence::forward && call.divergence != Divergence::reverse) {
    throw std::invalid_argument("divergence must be forward or reverse for tiles of the vocabulary");
  }
  const Kernels& chosen = kernels();
  KlTile with_workspace = call;
  const Scratch<1> scratch({int64_t{sizeof(float)} * 2 * call.threads * call.columns});
  with_workspace.workspace = reinterpret_cast<float*>(scratch[0]);
  parallel(call.threads, [&](int thread) { chosen.kl_tile(with_workspace, thread); });
}

}  // namespace softprompt
