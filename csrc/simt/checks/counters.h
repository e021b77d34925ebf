// What a launch asks of memory and of the matrix units, counted while `counting`.
//
// Accesses of a warp's lanes at the same instruction for the same time are one access of the warp, as on the device,
// where lanes that do the same run together. Of each, sectors (32 bytes of global memory) and wavefronts (passes over the
// 32 banks of shared memory, 4 bytes wide) are counted, as Nsight Compute names them:
//
//   shared memory   lanes pass together as 32 of up to 4 bytes, 16 of 8, or 8 of 16 bytes; a pass takes as many
//                   wavefronts as its busiest bank has different words; all beyond one a pass are conflicts
#pragma once

#include <cstddef>
#include <cstdint>

namespace softprompt::simt {

struct Counters {
  uint64_t launches, blocks, barriers;
  uint64_t most_shared_bytes;               // that a launch gave a block
  uint64_t loaded_bytes, stored_bytes;      // of registered memory, by any way
  uint64_t loaded_sectors, stored_sectors;  // of 32 bytes
  uint64_t shared_passes;                   // least wavefronts of shared memory's accesses
  uint64_t shared_conflicts;                // wavefronts beyond these: of ordinary accesses,
  uint64_t matrix_conflicts;                // of loads of matrices,
  uint64_t copy_conflicts;                  // and of asynchronous copies
  uint64_t products;                        // of 16 x 8 x 16, of whole warps
  uint64_t atomics;                         // of lanes
};

bool counting();
void set_counting(bool on);
Counters counters();
void reset_counters();

// The runtime's side.
void count_launch(size_t shared_bytes);
void count_block();  // has ended
void count_barrier();
void count_product();
void count_atomic();
void count_access(const void* address, size_t bytes, bool store, bool shared, const void* place);
void count_copy(const void* to, const void* place);
void count_matrix_load(void* const* rows, uint32_t count);  // `count` rows of 16 bytes, 8 a pass
void forget_accesses();                                     // of a block that has failed

}  // namespace softprompt::simt
