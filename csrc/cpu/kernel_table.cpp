// The kernels of one instruction set, as `instruction_set.cpp` finds them.
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
                       attention_merge,
                       attention_backward,
                       attention_fold,
                       kl_rows,
                       kl_logits,
                       expectation_rows,
                       kl_tile,
                       kHasMatrixUnit,
                       kMostProductDepth,
                       product_left_bytes,
                       product_workspace,
                       product_pack_left,
                       product};

}  // namespace softprompt::SPK_ISA
