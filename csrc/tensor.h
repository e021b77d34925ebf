// What the kernels take instead of tensors.
#pragma once

#include <cstdint>

namespace softprompt {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t kBytes[] = {4, 2, 2};  // of an element, by dtype

enum class Divergence : int { forward = 0, reverse = 1, jsd = 2 };

}  // namespace softprompt
