// What a thread calls the runtime for: its index, barriers, atomics. These functions are not inlined: kernels are
// compiled with a check before every access, and the runtime's own accesses must not be checked.
#pragma once

#include "simt/vector_types.h"

namespace softprompt::simt {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

void sync_threads();

float atomic_add(float* address, float value);
int atomic_add(int* address, int value);

}  // namespace softprompt::simt
