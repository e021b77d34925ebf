// The kernels that csrc/simt is tested with.
#pragma once

#include <cstdint>

namespace softprompt {

void run_gemm(uintptr_t a, uintptr_t b, uintptr_t c, int rows, int columns, int depth, bool bfloat16);

// Runs the kernel `name` of small_kernels.cu with `blocks` blocks of 64 threads. `data` has 64 floats.
void run_kernel(const char* name, uintptr_t data, uintptr_t out, int blocks);

}  // namespace softprompt
