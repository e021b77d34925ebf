// Small kernels that csrc/simt is tested with.
#pragma once

#include <cstdint>

namespace softprompt {

void run_gemm(uintptr_t a, uintptr_t b, uintptr_t c, int rows, int columns, int depth, bool bfloat16);

// `what` of faults.cu on 64 threads a block, `blocks` blocks; `data` has 64 floats.
void run_toy(const char* what, uintptr_t data, uintptr_t out, int blocks);

}  // namespace softprompt
