// Which instruction sets the kernels were compiled for, and which one runs.
#pragma once

#include <cstdint>

namespace softprompt {

// What the kernels are called with; defined with the kernels, in cpu/attention, cpu/losses and cpu/gemm.
struct AttentionProblem;
struct AttentionForward;
struct AttentionBackward;
struct KlRows;
struct KlLogits;
struct ExpectationRows;
struct KlTile;
struct Product;
struct ProductPart;

// The functions of each folder's kernels.h, compiled for one instruction set.
struct Kernels {
  const char* name;
  int64_t backward_row_align;  // see AttentionProblem
  int64_t (*attention_forward_workspace)(const AttentionProblem& problem);
  int64_t (*attention_backward_workspace)(const AttentionProblem& problem);
  void (*attention_forward)(const AttentionForward& call, int thread);
  void (*attention_merge)(const AttentionForward& call, int thread);
  void (*attention_backward)(const AttentionBackward& call, int thread);
  void (*attention_fold)(const AttentionBackward& call, int thread);
  void (*kl_rows)(const KlRows& call, int thread);
  void (*kl_logits)(const KlLogits& call, int thread);
  void (*expectation_rows)(const ExpectationRows& call, int thread);
  void (*kl_tile)(const KlTile& call, int thread);
  bool has_matrix_unit;
  int64_t most_product_depth;  // of a part of a product
  // nullptr where there are none
  int64_t (*product_left_bytes)(const Product& part);
  int64_t (*product_workspace)(const Product& part);
  void (*product_pack_left)(const ProductPart& part, int thread);
  void (*product)(const ProductPart& part, int thread);
};

// The widest that this machine has, or the one that SOFTPROMPT_ISA names when they are first asked for.
// Throws std::invalid_argument for a name that was not compiled or that the machine does not have.
const Kernels& kernels();

// Names of those that were compiled and that this machine has, widest first.
const char* const* usable_instruction_sets(int& count);

}  // namespace softprompt
