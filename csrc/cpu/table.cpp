// The kernels of one instruction set, as `isa.cpp` finds them.
#include "isa.h"

namespace softprompt::SPK_ISA {

void attention_forward(const AttentionForward& call, int thread);
void attention_backward(const AttentionBackward& call, int thread);
void attention_fold(const AttentionBackward& call, int thread);
void kl_rows(const KlRows& call, int thread);
void kl_logits(const KlLogits& call, int thread);
void expectation_rows(const ExpectationRows& call, int thread);

#define SPK_NAME_(x) #x
#define SPK_NAME(x) SPK_NAME_(x)

extern const Kernels table;
const Kernels table = {SPK_NAME(SPK_ISA), attention_forward, attention_backward, attention_fold,
                       kl_rows,           kl_logits,         expectation_rows};

}  // namespace softprompt::SPK_ISA
