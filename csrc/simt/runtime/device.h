// What a thread asks of the runtime: where it is, barriers, atomics. Not inlined, so that kernels, which are compiled
// with checks before every access, do not check the runtime's own.
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
