// Threads of a kernel as fibers: stacks of their own on one thread of the host, which change places when asked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace softprompt::simt {

constexpr size_t kStackBytes = 128 * 1024;   // of a fiber
constexpr size_t kReserveBytes = 64 * 1024;  // below, for what finds out that a kernel has used all
constexpr size_t kGuardBytes = 1024 * 1024;  // below that: nobody can touch it, and hardly a frame jumps over it

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // its lowest byte
  void* shadow = nullptr;  // AddressSanitizer's, while the fiber waits
};

// Makes `fiber`, which has a stack, begin with `entry` when it is next entered. `entry` must not return.
void prepare(Fiber& fiber, void (*entry)());

// Leaves the host's own stack for the fiber's, until it calls `leave`.
void enter(Fiber& fiber);

// Goes back to the host's stack; `for_good` when the fiber will not be entered again.
void leave(Fiber& fiber, bool for_good);

// Must be called first by the entry of a fiber.
void arrived();

// Whether the caller runs on a fiber.
bool in_fiber();

// As many stacks as asked for, kept for later calls. The caller serialises.
char* stack_of(size_t index);

}  // namespace softprompt::simt
