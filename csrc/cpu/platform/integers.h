// Integer arithmetic for sizes. Always inlined, with internal linkage: see simd.h for why.
#pragma once

#include <cstdint>

#ifndef SPK_INLINE
#define SPK_INLINE static inline __attribute__((always_inline))
#endif

namespace softprompt {

SPK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
SPK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
SPK_INLINE int64_t ceil_div(int64_t count, int64_t of) { return (count + of - 1) / of; }
SPK_INLINE int64_t round_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

}  // namespace softprompt
