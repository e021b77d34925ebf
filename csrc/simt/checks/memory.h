// Memory as a launch may use it: the buffers that were registered, the block's shared memory, the thread's own stack.
//
// Each 2 bytes of shared and of registered memory have a cell in its shadow, with the last write and the reads since.
// Two accesses of different threads, one of them a write and not both atomic, are a race unless something orders them:
//
//   in one block    a barrier between them; for lanes of a warp, __syncwarp too
//   in two blocks   nothing, as long as a launch lasts
//
// Whether two accesses race is so decided by what orders them and not by when they happen to run. (A byte beside a byte
// that another thread writes is taken for a race: the cells are two bytes wide.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace softprompt::simt {

enum class Access { read, write, atomic };

// What an access of a thread must pass, and is counted by; `place` is where in the kernel's code it is.
void check_access(const void* address, size_t bytes, Access access, const void* place);

// Makes memory known to launches, from its first byte on. Pieces must not overlap.
void register_memory(uintptr_t address, size_t bytes, bool writable);
void unregister_memory(uintptr_t address);

// Prepares the shadow of a block's shared memory, before a launch.
void begin_shadow(size_t shared_bytes);

// An asynchronous copy of 16 bytes to shared memory: from its issue on nobody may look, until it has landed.
void issue_copy(void* to, const void* place);
void land_copy(void* to);

// Whether the address is in the block's shared memory.
bool is_shared(const void* address);

// Of each registered piece, in the order of addresses.
struct Traffic {
  uintptr_t address;
  uint64_t loaded, stored;  // bytes
};
std::vector<Traffic> traffic();

}  // namespace softprompt::simt
