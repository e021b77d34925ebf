// Memory that a call works in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

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

// Uninitialised bytes for a call to work in, of which a thread has one at a time. The thread keeps them for its next call:
// an allocator that hands the end of its heap back to the system as soon as it is free, as glibc's does, would take longer
// over that, and over the new pages of the next call, than a call over a small batch takes. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kMostKept = int64_t{32} << 20;
    thread_local Memory kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kMostKept) {
      large_ = allocate(bytes);
      return;
    }
    if (bytes > kept_bytes) {
      kept.reset();
      kept_bytes = 0;
      kept = allocate(bytes);
      kept_bytes = bytes;
    }
    kept_ = kept.get();
  }
  char* get() const { return large_ ? large_.get() : kept_; }

 private:
  Memory large_;
  char* kept_ = nullptr;
};

// Asks for large pages in memory that will be written to from end to end. What malloc cannot take from what was freed,
// from 32 MiB on with glibc, are new pages, which the system clears one at a time as they are first touched: with small
// ones that takes as long as the softmax that is written to them.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kNew = int64_t{32} << 20;
  const int64_t page = sysconf(_SC_PAGESIZE);
  if (bytes < kNew || page <= 0) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // it may refuse: it is a hint
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace softprompt
