// Memory that a call works in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace softprompt {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Uninitialised bytes on a cache line's boundary. Throws std::bad_alloc, which is Python's MemoryError.
inline Memory allocate(int64_t bytes) {
  if (bytes < 0 || bytes > std::numeric_limits<int64_t>::max() - 64) throw std::bad_alloc();
  void* memory = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64 + 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(static_cast<char*>(memory));
}

}  // namespace softprompt
