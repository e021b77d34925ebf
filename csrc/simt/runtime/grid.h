// The state of a running launch: threads, warps, and the current block. Blocks run one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt/runtime/fiber.h"
#include "simt/vector_types.h"

namespace softprompt::simt {

constexpr uint32_t kLanes = 32;
using LaneMask = uint32_t;  // one bit for each lane of a warp

// An asynchronous copy of 16 bytes that was issued and not waited for yet.
struct Copy {
  char* to;
  const char* from;  // null: zeros
  uint32_t group;    // number of groups that its thread had committed before
  const void* place;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t linear;      // within the block
  uint32_t groups = 0;  // of copies, committed so far
  std::vector<Copy> copies;
  const void* place;  // where in the code it waits

  uint32_t lane() const { return linear % kLanes; }
  uint32_t warp() const { return linear / kLanes; }
};

// A lane of a warp is ready, at a barrier of the block, at a collective operation of the warp, or it has ended.
struct Warp {
  LaneMask exist, ready, at_barrier, at_collective;
  uint32_t epoch;  // number of __syncwarp so far: accesses in different epochs are ordered

  // The arguments of the lanes that are at a collective operation; see `run_collective`.
  int operation[kLanes];
  LaneMask mask[kLanes];
  void* argument[kLanes];
};

struct Block {
  uint3 index;
  uint32_t first_epoch, epoch;  // number of barriers of all launches: at its beginning, and now
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char* shared;  // dynamic shared memory
  size_t shared_bytes;
};

struct Launch {
  dim3 grid, block;
  const void* kernel;  // address of its code
  void* call;          // its parameters, and what else `invoke` needs. Threads may read it
  size_t call_bytes;
  void (*invoke)(void* call);  // runs the kernel as the current thread
  uint32_t first_epoch;
};

// Of the current launch. There is one at a time.
Block& block();
Thread& thread();
const Launch& current_launch();
bool in_thread();  // whether the caller is a thread of a launch

// __syncthreads: waits until all threads of the block that have not ended have called it.
void wait_for_block(const void* place);

// Operations from this number on are instructions that all lanes must run at the same place in the code.
constexpr int kAligned = 100;

// A collective operation: waits until all lanes of `mask` have called it with the same `operation` and `mask`. The last
// of them then calls `combine` with the arguments of all lanes, indexed by lane, and all lanes continue.
void run_collective(int operation, LaneMask mask, void* argument, void (*combine)(void** arguments, LaneMask mask),
                    const void* place);

// Runs the kernel of `launch` for each thread of each block. Sets the launch's epoch.
//
// Throws KernelError if a thread does something undefined, and std::bad_alloc.
void run(Launch launch, size_t shared_bytes);

// Seeds the schedule of the launches that follow: the order of blocks, and which ready thread runs next.
void set_seed(uint64_t seed);

}  // namespace softprompt::simt
