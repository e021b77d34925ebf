// Divides a thread's workspace into arrays.
#pragma once

#include "cpu/platform/integers.h"
#include "cpu/platform/simd.h"

namespace softprompt::SPK_ISA {

// Hands out arrays from one block of memory. Each starts at a multiple of 64 bytes, a cache line.
class Arena {
 public:
  explicit Arena(char* memory) : at_(reinterpret_cast<uintptr_t>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
  uintptr_t end() const { return at_; }

 private:
  uintptr_t at_;
};

}  // namespace softprompt::SPK_ISA
