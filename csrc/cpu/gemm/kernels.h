// The GEMM kernels of one instruction set, if it has a GEMM: the work of one thread.
#pragma once

#include "cpu/gemm/gemm.h"

namespace softprompt::SPK_ISA {

#ifdef SPK_AMX
constexpr bool kHasMatrixUnit = true;
constexpr int64_t kMaxGemmDepth = INT32_MAX;
#else
constexpr bool kHasMatrixUnit = false;
constexpr int64_t kMaxGemmDepth = 2048;
#endif

#ifdef SPK_GEMM
// Sizes for a part with as many rows and as much depth as any part of the GEMM.
int64_t gemm_packed_a_bytes(const Gemm& gemm);
int64_t gemm_workspace(const Gemm& gemm);

void gemm_pack_a(const GemmPart& part, int thread);
void gemm_multiply(const GemmPart& part, int thread);
#else
constexpr int64_t (*gemm_packed_a_bytes)(const Gemm&) = nullptr;
constexpr int64_t (*gemm_workspace)(const Gemm&) = nullptr;
constexpr void (*gemm_pack_a)(const GemmPart&, int) = nullptr;
constexpr void (*gemm_multiply)(const GemmPart&, int) = nullptr;
#endif

}  // namespace softprompt::SPK_ISA
