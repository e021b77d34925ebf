// What a running launch consists of: threads, warps, and the block that runs. Blocks run one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simt/runtime/fiber.h"
#include "simt/vector_types.h"

namespace softprompt::simt {

constexpr uint32_t kLanes = 32;
using Lanes = uint32_t;  // of a warp, a bit each

// An asynchronous copy of 16 bytes that has been issued and not yet waited for.
struct Copy {
  char* to;
  const char* from;  // null: zeros
  uint32_t group;    // how many groups its thread had made before
  const void* place;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  uint32_t linear;      // within the block
  uint32_t groups = 0;  // of copies that it has committed
  std::vector<Copy> copies;
  const void* place;  // where it waits

  uint32_t lane() const { return linear % kLanes; }
  uint32_t warp() const { return linear / kLanes; }
};

// A warp's lanes are ready, at a barrier of the block, at a meeting, or at their end.
struct Warp {
  Lanes exist, ready, at_barrier, at_meeting;
  uint32_t epoch;  // __syncwarp so far: accesses of lanes in different epochs are ordered

  // What those at a meeting have left there; see `meet`.
  int operation[kLanes];
  Lanes mask[kLanes];
  void* argument[kLanes];
};

struct Block {
  uint3 index;
  uint32_t first_epoch, epoch;  // barriers of all launches: as it began, and now
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char* shared;  // dynamic shared memory
  size_t shared_bytes;
};

struct Launch {
  dim3 grid, block;
  const void* kernel;  // its code
  void* call;          // its parameters, and what `invoke` needs beside them; threads may read it
  size_t call_bytes;
  void (*invoke)(void* call);  // runs the kernel as the current thread
  uint32_t first_epoch;
};

// Of the launch in progress; there is one at a time.
Block& block();
Thread& thread();
const Launch& current_launch();
bool in_thread();  // whether a thread of a launch is what runs

// __syncthreads: waits until all threads of the block that have not ended are there.
void wait_for_block(const void* place);

// Operations from here on are instructions that the lanes run together, and so at one place.
constexpr int kAligned = 100;

// Waits until all lanes of `mask` have come to the same operation; the last of them runs `combine` on what each has
// left, by lane, and no lane goes on before.
void meet(int operation, Lanes mask, void* argument, void (*combine)(void** arguments, Lanes mask), const void* place);

// Runs a kernel, for each thread of each block of `launch`, whose epoch is set here.
//
// Raises Fault when a thread does what is not defined, and std::bad_alloc.
void run(Launch launch, size_t shared_bytes);

// From now on, launches are scheduled from this seed: the order of blocks, and who goes on when several can.
void set_seed(uint64_t seed);

}  // namespace softprompt::simt
