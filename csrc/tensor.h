// The numbers of dtypes and divergences, which Python and C++ share. A kernel gets pointers, sizes, strides and these,
// and no tensor objects.
#pragma once

#include <cstdint>

namespace softprompt {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t kBytes[] = {4, 2, 2};  // size of an element, by dtype

// The same as DIVERGENCES in softprompt_kernels/kernels/problems/loss.py.
enum class Divergence : int { forward = 0, reverse = 1, jsd = 2 };

}  // namespace softprompt
