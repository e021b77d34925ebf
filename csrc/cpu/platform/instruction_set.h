// Which instruction sets the kernels are compiled for, and the choice of the one that runs.
#pragma once

#include <cstdint>

namespace softprompt {

// Arguments of the kernels. They are defined with the kernels, in cpu/attention, cpu/losses and cpu/gemm.
struct AttentionProblem;
struct AttentionForward;
struct AttentionBackward;
struct KlRows;
struct KlLogits;
struct ExpectationRows;
struct KlTile;
struct Gemm;
struct GemmPart;

// The functions declared in the kernels.h of each folder, compiled for one instruction set.
struct Kernels {
  const char* name;
  int64_t backward_row_align;  // see AttentionProblem
  int64_t (*attention_forward_workspace)(const AttentionProblem& problem);
  int64_t (*attention_backward_workspace)(const AttentionProblem& problem);
  void (*attention_forward)(const AttentionForward& call, int thread);
  void (*attention_combine)(const AttentionForward& call, int thread);
  void (*attention_backward)(const AttentionBackward& call, int thread);
  void (*attention_reduce)(const AttentionBackward& call, int thread);
  void (*kl_rows)(const KlRows& call, int thread);
  void (*kl_logits)(const KlLogits& call, int thread);
  void (*expectation_rows)(const ExpectationRows& call, int thread);
  void (*kl_tile)(const KlTile& call, int thread);
  bool has_matrix_unit;
  int64_t max_gemm_depth;  // the largest depth of a GemmPart
  // The GEMM kernels; nullptr in an instruction set that has none.
  int64_t (*gemm_packed_a_bytes)(const Gemm& gemm);
  int64_t (*gemm_workspace)(const Gemm& gemm);
  void (*gemm_pack_a)(const GemmPart& part, int thread);
  void (*gemm_multiply)(const GemmPart& part, int thread);
};

// The kernels of the widest instruction set that this machine has, or of the one that SOFTPROMPT_ISA names. The first
// call chooses. Throws std::invalid_argument if the named one was not compiled or this machine does not have it.
const Kernels& kernels();

// Names of the instruction sets that were compiled and that this machine has, widest first.
const char* const* usable_instruction_sets(int& count);

}  // namespace softprompt
