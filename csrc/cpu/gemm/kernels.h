// The GEMM of one instruction set, where it has one: the work of one thread.
#pragma once

#include "cpu/gemm/gemm.h"

namespace softprompt::SPK_ISA {

#ifdef SPK_AMX
constexpr bool kHasMatrixUnit = true;
constexpr int64_t kMostProductDepth = INT32_MAX;
#else
constexpr bool kHasMatrixUnit = false;
constexpr int64_t kMostProductDepth = 2048;
#endif

#ifdef SPK_PRODUCTS
// Of a part with as many rows and as much depth as any.
int64_t product_left_bytes(const Product& part);
int64_t product_workspace(const Product& part);
void product_pack_left(const ProductPart& part, int thread);
void product(const ProductPart& part, int thread);
#else
constexpr int64_t (*product_left_bytes)(const Product&) = nullptr;
constexpr int64_t (*product_workspace)(const Product&) = nullptr;
constexpr void (*product_pack_left)(const ProductPart&, int) = nullptr;
constexpr void (*product)(const ProductPart&, int) = nullptr;
#endif

}  // namespace softprompt::SPK_ISA
