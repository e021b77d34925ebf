// Fibers: each thread of a kernel has its own stack. All run on one thread of the host, which switches between stacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace softprompt::simt {

constexpr size_t kStackBytes = 128 * 1024;   // of a fiber
constexpr size_t kReserveBytes = 64 * 1024;  // below the stack: room for the check that finds an overflow
constexpr size_t kGuardBytes = 1024 * 1024;  // below that: inaccessible, and larger than almost any frame

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;   // its lowest byte
  void* shadow = nullptr;  // AddressSanitizer's, while the fiber waits
};

// Makes `fiber` begin with `entry` when it is next entered. Its stack must be set. `entry` must not return.
void prepare(Fiber& fiber, void (*entry)());

// Switches from the host's stack to the fiber's. Returns when the fiber calls `leave`.
void enter(Fiber& fiber);

// Switches back to the host's stack. `for_good`: the fiber will not be entered again.
void leave(Fiber& fiber, bool for_good);

// The entry function of a fiber must call this first.
void arrived();

// Whether the caller runs on a fiber.
bool in_fiber();

// The stack with this index. Stacks are allocated at first use and kept. Not thread safe.
char* stack_of(size_t index);

}  // namespace softprompt::simt
