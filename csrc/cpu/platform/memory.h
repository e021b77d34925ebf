// Memory for the workspaces of a call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "cpu/platform/integers.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace softprompt {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Uninitialised bytes, aligned to a cache line. Throws std::bad_alloc, which becomes Python's MemoryError.
inline Memory allocate(int64_t bytes) {
  if (bytes < 0 || bytes > std::numeric_limits<int64_t>::max() - 64) throw std::bad_alloc();
  void* memory = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64 + 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(static_cast<char*>(memory));
}

// At least `bytes` bytes that belong to the calling thread until it calls this again. Throws std::bad_alloc.
inline char* thread_memory(int64_t bytes) {
  thread_local Memory kept;
  thread_local int64_t kept_bytes = 0;
  if (bytes > kept_bytes) {
    kept.reset();
    kept_bytes = 0;
    kept = allocate(bytes);
    kept_bytes = bytes;
  }
  return kept.get();
}

#if defined(__SANITIZE_ADDRESS__)
#define SPK_REUSES_MEMORY false
#elif defined(__has_feature)
#define SPK_REUSES_MEMORY !__has_feature(address_sanitizer)
#else
#define SPK_REUSES_MEMORY true
#endif

// Uninitialised memory for one call, as several buffers. A thread has one Scratch at a time. The memory stays with the
// thread for its next call. glibc's allocator returns the end of its heap to the system as soon as it is free; that,
// and the page faults of the next call, would take longer than a call over a small batch. Under AddressSanitizer each
// buffer is an allocation of its own, so that accesses beyond its end are found.
template <size_t count>
class Scratch {
 public:
  // Throws std::bad_alloc.
  explicit Scratch(const int64_t (&bytes)[count]) {
    if (!SPK_REUSES_MEMORY) {
      for (size_t i = 0; i < count; ++i) own_[i] = allocate(bytes[i]), data_[i] = own_[i].get();
      return;
    }
    int64_t total = 0;
    for (const int64_t size : bytes) total += round_up(size, kLine);
    if (total > kMaxKept) own_[0] = allocate(total);
    char* next = total > kMaxKept ? own_[0].get() : thread_memory(total);
    for (size_t i = 0; i < count; ++i) data_[i] = next, next += round_up(bytes[i], kLine);
  }
  char* operator[](size_t buffer) const { return data_[buffer]; }

 private:
  static constexpr int64_t kMaxKept = int64_t{32} << 20, kLine = 64;

  std::array<Memory, count> own_;
  std::array<char*, count> data_;
};

// Asks for large pages for memory that will be written from end to end. From 32 MiB on, glibc's malloc maps new pages
// instead of reusing freed memory. The system clears each page when it is first touched; with small pages that takes as
// long as computing the softmax that is written to them.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kMmapThreshold = int64_t{32} << 20;
  const int64_t page = sysconf(_SC_PAGESIZE);
  if (bytes < kMmapThreshold || page <= 0) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: it may fail
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace softprompt
