// The memory that a launch may access: registered buffers, the block's shared memory, and the thread's own stack.
//
// Every 2 bytes of shared and registered memory have a cell in a shadow, which holds the last write and the reads
// since. Two accesses of different threads are a race if at least one is a write, not both are atomic, and nothing
// orders them:
//
//   in one block    a barrier orders them; for lanes of one warp, __syncwarp does too
//   in two blocks   nothing orders them within a launch
//
// So races do not depend on the order in which the threads happen to run. (A cell is two bytes wide, so accesses of two
// neighbouring bytes are reported as a race too.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace softprompt::simt {

enum class Access { read, write, atomic };

// Checks and counts an access of the current thread. `place` is its address in the kernel's code.
void check_access(const void* address, size_t bytes, Access access, const void* place);

// Lets launches access this memory. Buffers must not overlap.
void register_memory(uintptr_t address, size_t bytes, bool writable);
void unregister_memory(uintptr_t address);

// Makes a new shadow of shared memory, before a launch.
void reset_shared_shadow(size_t shared_bytes);

// An asynchronous copy of 16 bytes to shared memory. The destination must not be accessed between these two calls.
void issue_copy(void* to, const void* place);
void complete_copy(void* to);

// Whether the address is in the block's shared memory.
bool is_shared(const void* address);

// The bytes loaded from and stored to each registered buffer, in the order of addresses.
struct Traffic {
  uintptr_t address;
  uint64_t loaded, stored;  // bytes
};
std::vector<Traffic> traffic();

}  // namespace softprompt::simt
