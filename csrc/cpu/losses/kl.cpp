// The KL kernels on all threads, for whichever instruction set is here.
#include "cpu/losses/kl.h"

#include <algorithm>

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
  KlLogits with_scratch = call;
  with_scratch.threads = static_cast<int>(std::min<int64_t>(call.threads, std::max<int64_t>(call.rows, 1)));
  const Scratch<1> scratch({int64_t{sizeof(float)} * 2 * with_scratch.threads * call.vocab});
  if (call.gradient != nullptr && call.gradient_stride == call.columns) {
    const int64_t element = kBytes[static_cast<int>(call.student_dtype)];
    prefer_large_pages(call.gradient, call.rows * call.columns * element);
  }
  with_scratch.scratch = reinterpret_cast<float*>(scratch[0]);
  parallel(with_scratch.threads, [&](int thread) { chosen.kl_logits(with_scratch, thread); });
}

void run(const ExpectationRows& call) {
  const Kernels& chosen = kernels();
  parallel(call.threads, [&](int thread) { chosen.expectation_rows(call, thread); });
}

void run(const KlTile& call) {
  const Kernels& chosen = kernels();
  KlTile with_scratch = call;
  const Scratch<1> scratch({int64_t{sizeof(float)} * 2 * call.threads * call.columns});
  with_scratch.scratch = reinterpret_cast<float*>(scratch[0]);
  parallel(call.threads, [&](int thread) { chosen.kl_tile(with_scratch, thread); });
}

}  // namespace softprompt
