// The table of the kernels of one instruction set, which `instruction_set.cpp` looks up by name.
#include "cpu/attention/kernels.h"
#include "cpu/gemm/kernels.h"
#include "cpu/losses/kernels.h"
#include "cpu/platform/instruction_set.h"

#define SPK_NAME_(x) #x
#define SPK_NAME(x) SPK_NAME_(x)

namespace softprompt::SPK_ISA {

extern const Kernels table;
const Kernels table = {SPK_NAME(SPK_ISA),
                       kBackwardRowAlign,
                       attention_forward_workspace,
                       attention_backward_workspace,
                       attention_forward,
                       attention_combine,
                       attention_backward,
                       attention_reduce,
                       kl_rows,
                       kl_logits,
                       expectation_rows,
                       kl_tile,
                       kHasMatrixUnit,
                       kMaxGemmDepth,
                       gemm_packed_a_bytes,
                       gemm_workspace,
                       gemm_pack_a,
                       gemm_multiply};

}  // namespace softprompt::SPK_ISA
