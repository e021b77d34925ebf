// The functions that g++ -fsanitize=thread calls before every load and store of a kernel. They call `check_access`.
//
// Kernels are compiled with that option and linked without it, so these functions are called and not ThreadSanitizer's.
// Names and arguments are those of GCC's sanitizer.def.
#include <cstddef>
#include <cstdint>

#include "simt/checks/error.h"
#include "simt/checks/memory.h"
#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

// Launchers are compiled with the same option. They do not run in a thread of a kernel and are not checked.
inline void check(const void* address, size_t bytes, Access access, const void* place) {
  if (in_thread()) check_access(address, bytes, access, place);
}

inline void check_aligned(const void* address, size_t bytes, Access access, const void* place) {
  if (!in_thread()) return;
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(place, "an access of %zu bytes at %p, which is not a multiple of them", bytes, address);
  }
  check_access(address, bytes, access, place);
}

}  // namespace
}  // namespace softprompt::simt

#define SPK_PLACE __builtin_return_address(0)
#define SPK_ENTRY(bytes)                                                                                           \
  void __tsan_read##bytes(void* at) {                                                                              \
    softprompt::simt::check_aligned(at, bytes, softprompt::simt::Access::read, SPK_PLACE);                         \
  }                                                                                                                \
  void __tsan_write##bytes(void* at) {                                                                             \
    softprompt::simt::check_aligned(at, bytes, softprompt::simt::Access::write, SPK_PLACE);                        \
  }                                                                                                                \
  void __tsan_unaligned_read##bytes(void* at) {                                                                    \
    softprompt::simt::check(at, bytes, softprompt::simt::Access::read, SPK_PLACE);                                 \
  }                                                                                                                \
  void __tsan_unaligned_write##bytes(void* at) {                                                                   \
    softprompt::simt::check(at, bytes, softprompt::simt::Access::write, SPK_PLACE);                                \
  }                                                                                                                \
  void __tsan_volatile_read##bytes(void* at) {                                                                     \
    softprompt::simt::check_aligned(at, bytes, softprompt::simt::Access::read, SPK_PLACE);                         \
  }                                                                                                                \
  void __tsan_volatile_write##bytes(void* at) {                                                                    \
    softprompt::simt::check_aligned(at, bytes, softprompt::simt::Access::write, SPK_PLACE);                        \
  }

extern "C" {
SPK_ENTRY(1)
SPK_ENTRY(2)
SPK_ENTRY(4)
SPK_ENTRY(8)
SPK_ENTRY(16)

void __tsan_read_range(void* at, size_t bytes) {
  softprompt::simt::check(at, bytes, softprompt::simt::Access::read, SPK_PLACE);
}
void __tsan_write_range(void* at, size_t bytes) {
  softprompt::simt::check(at, bytes, softprompt::simt::Access::write, SPK_PLACE);
}
void __tsan_vptr_update(void** at, void*) {
  softprompt::simt::check(at, sizeof *at, softprompt::simt::Access::write, SPK_PLACE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
