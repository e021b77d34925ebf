// Memory that a call works in.
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

// Uninitialised bytes on a cache line's boundary. Throws std::bad_alloc, which is Python's MemoryError.
inline Memory allocate(int64_t bytes) {
  if (bytes < 0 || bytes > std::numeric_limits<int64_t>::max() - 64) throw std::bad_alloc();
  void* memory = std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64 + 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(static_cast<char*>(memory));
}

// At least so many bytes, which are the calling thread's until it asks again. Throws std::bad_alloc.
inline char* keep(int64_t bytes) {
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
#define SPK_KEEPS_MEMORY false
#elif defined(__has_feature)
#define SPK_KEEPS_MEMORY !__has_feature(address_sanitizer)
#else
#define SPK_KEEPS_MEMORY true
#endif

// Uninitialised memory for a call to work in, in some parts, of which a thread has one at a time. The thread keeps it for
// its next call: an allocator that hands the end of its heap back to the system as soon as it is free, as glibc's does,
// would take longer over that, and over the new pages of the next call, than a call over a small batch takes.
// AddressSanitizer sees parts of their own, each of its own size.
template <size_t parts>
class Scratch {
 public:
  // Throws std::bad_alloc.
  explicit Scratch(const int64_t (&bytes)[parts]) {
    if (!SPK_KEEPS_MEMORY) {
      for (size_t i = 0; i < parts; ++i) own_[i] = allocate(bytes[i]), data_[i] = own_[i].get();
      return;
    }
    int64_t total = 0;
    for (const int64_t part : bytes) total += round_up(part, kLine);
    if (total > kMostKept) own_[0] = allocate(total);
    char* next = total > kMostKept ? own_[0].get() : keep(total);
    for (size_t i = 0; i < parts; ++i) data_[i] = next, next += round_up(bytes[i], kLine);
  }
  char* operator[](size_t part) const { return data_[part]; }

 private:
  static constexpr int64_t kMostKept = int64_t{32} << 20, kLine = 64;

  std::array<Memory, parts> own_;
  std::array<char*, parts> data_;
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
