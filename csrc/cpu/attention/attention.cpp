// Runs the attention kernels: takes the workspaces, starts the threads, and zeroes what no work unit writes.
#include "cpu/attention/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/attention/problem.h"
#include "cpu/platform/instruction_set.h"
#include "cpu/platform/memory.h"
#include "cpu/platform/parallel.h"

namespace softprompt {
namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kMaxLanes = 16;  // of the widest instruction set; buffers are large enough for it

int64_t up_to_lanes(int64_t size) { return (size + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

int64_t bytes_of(Dtype dtype) { return kBytes[static_cast<int>(dtype)]; }

// Zeroes the tokens behind the last sequence of a packed call, in a token-major tensor.
void zero_uncovered(const Strided& tensor, Dtype dtype, int64_t covered, int64_t tokens, int64_t row) {
  if (tensor.data == nullptr || covered == tokens) return;
  std::memset(row_of(tensor, dtype, 0, 0, covered), 0, (tokens - covered) * row * bytes_of(dtype));
}

// Zeroes the gradients of keys that belong to no unit.
void zero_unused(const KeyGradients& gradients, Dtype dtype, int64_t size, int64_t value_size,
                 const std::vector<KeyRange>& unused) {
  const auto zero = [&](const Strided& gradient, int64_t row) {
    for (const KeyRange& keys : unused) {
      for (int64_t i = 0; i < keys.count && gradient.data != nullptr; ++i) {
        std::memset(row_of(gradient, dtype, keys.batch, keys.head, keys.first + i), 0, row * bytes_of(dtype));
      }
    }
  };
  zero(gradients.grad_key, size);
  zero(gradients.grad_value, value_size);
}

KeyGradients key_gradients(const Strided& grad_key, const Strided& grad_value, const AttentionProblem& problem,
                           int64_t keys) {
  KeyGradients gradients = {};
  gradients.needed = grad_key.data != nullptr || grad_value.data != nullptr;
  gradients.grad_key = grad_key;
  gradients.grad_value = grad_value;
  gradients.buffer_floats = gradients.needed ? keys * (up_to_lanes(problem.size) + up_to_lanes(problem.value_size)) : 0;
  return gradients;
}

}  // namespace

void run_attention_forward(AttentionProblem problem, const AttentionSizes& sizes, const ForwardOutputs& outputs) {
  const Kernels& isa = kernels();
  problem.row_align = 1;
  const AttentionPlan plan = plan_attention(problem, sizes, true);
  plan.attach(problem);
  AttentionForward call = {};
  call.problem = problem;
  call.out = outputs.out;
  call.lse = outputs.lse;
  call.queries = sizes.queries;
  call.workspace_bytes = isa.attention_forward_workspace(problem);
  call.split_groups = plan.split_groups.data();
  call.split_group_count = static_cast<int64_t>(plan.split_groups.size());
  const Scratch<2> scratch(
      {problem.threads * call.workspace_bytes, plan.partial_rows * (up_to_lanes(problem.value_size) + 2) * kFloat});
  call.workspace = scratch[0];
  call.partials = reinterpret_cast<float*>(scratch[1]);

  parallel(problem.threads, [&](int thread) { isa.attention_forward(call, thread); });
  if (call.split_group_count > 0) parallel(problem.threads, [&](int thread) { isa.attention_combine(call, thread); });
  zero_uncovered(outputs.out, problem.dtype, plan.covered_tokens, sizes.queries, problem.heads * problem.value_size);
  for (int64_t head = 0; head < problem.heads && plan.covered_tokens < sizes.queries; ++head) {
    std::fill(outputs.lse + head * sizes.queries + plan.covered_tokens, outputs.lse + (head + 1) * sizes.queries,
              -std::numeric_limits<float>::infinity());
  }
}

void run_attention_backward(AttentionProblem problem, const AttentionSizes& sizes, const BackwardInputs& inputs,
                            const BackwardOutputs& outputs) {
  const Kernels& isa = kernels();
  problem.row_align = isa.backward_row_align;
  AttentionPlan plan = plan_attention(problem, sizes, false);
  const KeyRanges own = find_own_ranges(plan, problem, sizes), prompts = find_prompt_ranges(plan, problem, sizes);
  plan.attach(problem);
  AttentionBackward call = {};
  call.problem = problem;
  call.out = inputs.out;
  call.grad_out = inputs.grad_out;
  call.lse = inputs.lse;
  call.grad_lse = inputs.grad_lse;
  call.queries = sizes.queries;
  call.need_query = outputs.grad_query.data != nullptr;
  call.grad_query = outputs.grad_query;
  int64_t max_keys = 0;
  for (const Sequence& sequence : plan.sequences) max_keys = std::max(max_keys, sequence.keys);
  call.own = key_gradients(outputs.grad_key, outputs.grad_value, problem, max_keys);
  call.prompt = key_gradients(outputs.grad_prompt_key, outputs.grad_prompt_value, problem, sizes.prompt_keys);
  call.own.shared = own.shared.data();
  call.own.shared_count = static_cast<int64_t>(own.shared.size());
  call.prompt.shared = prompts.shared.data();
  call.prompt.shared_count = static_cast<int64_t>(prompts.shared.size());
  call.prompt_keys = sizes.prompt_keys;
  call.workspace_bytes = isa.attention_backward_workspace(problem);
  const Scratch<3> scratch({problem.threads * call.workspace_bytes,
                            problem.threads * 2 * call.own.buffer_floats * kFloat,
                            problem.threads * 2 * call.prompt.buffer_floats * kFloat});
  std::vector<double> grad_sinks(outputs.grad_sinks == nullptr ? 0 : problem.threads * problem.heads, 0.0);
  call.workspace = scratch[0];
  call.own.buffers = reinterpret_cast<float*>(scratch[1]);
  call.prompt.buffers = reinterpret_cast<float*>(scratch[2]);
  call.grad_sinks = grad_sinks.empty() ? nullptr : grad_sinks.data();

  parallel(problem.threads, [&](int thread) { isa.attention_backward(call, thread); });
  if (call.own.shared_count + call.prompt.shared_count > 0) {
    parallel(problem.threads, [&](int thread) { isa.attention_reduce(call, thread); });
  }
  zero_unused(call.own, problem.dtype, problem.size, problem.value_size, own.unused);
  zero_unused(call.prompt, problem.dtype, problem.size, problem.value_size, prompts.unused);
  zero_uncovered(outputs.grad_query, problem.dtype, plan.covered_tokens, sizes.queries, problem.heads * problem.size);
  for (int64_t head = 0; head < problem.heads && outputs.grad_sinks != nullptr; ++head) {
    double sum = 0;
    for (int thread = 0; thread < problem.threads; ++thread) sum += grad_sinks[thread * problem.heads + head];
    outputs.grad_sinks[head] = static_cast<float>(sum);
  }
}

}  // namespace softprompt
