// Counters of memory traffic and matrix instructions. They run while `counting` is on.
//
// If lanes of a warp come to the same instruction, each for the n-th time, that is one access of the warp, as on the
// device, where such lanes run together. For global memory its sectors (32 bytes) are counted. For shared memory its
// passes and wavefronts are counted, as Nsight Compute names them:
//
//   One pass serves 32 lanes with up to 4 bytes each, 16 lanes with 8 bytes, or 8 lanes with 16 bytes. Shared memory
//   has 32 banks of 4-byte words. A pass takes as many wavefronts as its busiest bank has different words. All
//   wavefronts beyond one a pass are conflicts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace softprompt::simt {

struct Counters {
  uint64_t launches, blocks, barriers;
  uint64_t max_shared_bytes;                // largest dynamic shared memory of a launch
  uint64_t loaded_bytes, stored_bytes;      // of registered memory, by any instruction
  uint64_t loaded_sectors, stored_sectors;  // of 32 bytes
  uint64_t shared_passes;                   // wavefronts without any conflict
  uint64_t shared_conflicts;                // wavefronts beyond these: of ordinary accesses,
  uint64_t matrix_conflicts;                // of ldmatrix,
  uint64_t copy_conflicts;                  // and of cp.async
  uint64_t mma;                             // mma.m16n8k16, one for a warp
  uint64_t atomics;                         // one for a lane
};

bool counting();
void set_counting(bool on);
Counters counters();
void reset_counters();

// Called by the runtime.
void count_launch(size_t shared_bytes);
void count_block();  // at the end of a block
void count_barrier();
void count_mma();
void count_atomic();
void count_access(const void* address, size_t bytes, bool store, bool shared, const void* place);
void count_copy(const void* to, const void* place);
void count_matrix_load(void* const* rows, uint32_t count);  // `count` rows of 16 bytes, 8 a pass
void forget_accesses();                                     // after an error in a block

}  // namespace softprompt::simt
