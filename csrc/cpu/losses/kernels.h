// The loss kernels of one instruction set. Each call does the work of one thread.
#pragma once

#include "cpu/losses/kl.h"

namespace softprompt::SPK_ISA {

void kl_rows(const KlRows& call, int thread);
void kl_logits(const KlLogits& call, int thread);
void expectation_rows(const ExpectationRows& call, int thread);
void kl_tile(const KlTile& call, int thread);

}  // namespace softprompt::SPK_ISA
