// The attention kernels of the CPU for Python. Tensors come as address, sizes and strides, which are checked before any
// pointer is followed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "bindings/views.h"
#include "cpu/attention/attention.h"

namespace softprompt {
namespace {

// The inputs of forward and backward, checked. Python makes one for each call of the op.
class Problem {
 public:
  Problem(int dtype, const View& query, const View& key, const View& value, const View& prompt_key,
          const View& prompt_value, const std::optional<Vector>& prompt_index,
          const std::optional<Vector>& prompt_lengths, const std::optional<Vector>& key_lengths,
          const std::optional<Vector>& cu_seqlens, const std::optional<Vector>& sinks, bool causal,
          std::optional<int64_t> window, std::optional<double> softcap, double scale, int threads) {
    problem.dtype = dtype_of("dtype", dtype);
    check_threads(threads);
    if (window) check_at_least("window", *window, 1);
    const auto [batch, heads, queries, size] = std::get<1>(query);
    const auto [key_batch, kv_heads, keys, key_size] = std::get<1>(key);
    const auto [prompts, prompt_heads, prompt_keys, prompt_size] = std::get<1>(prompt_key);
    const int64_t value_size = std::get<1>(value)[3];
    problem.group = group_of(heads, kv_heads);
    check_at_least("query's head size", size, 1);
    check_at_least("value's head size", value_size, 1);
    problem.query = strided<Strided>("query", query, {batch, heads, queries, size});
    problem.key = strided<Strided>("key", key, {batch, kv_heads, keys, size});
    problem.value = strided<Strided>("value", value, {batch, kv_heads, keys, value_size});
    problem.prompt_key = strided<Strided>("prompt_key", prompt_key, {prompts, kv_heads, prompt_keys, size});
    problem.prompt_value = strided<Strided>("prompt_value", prompt_value, {prompts, kv_heads, prompt_keys, value_size});
    if (cu_seqlens) {
      check_at_least("cu_seqlens' length", std::get<1>(*cu_seqlens), 1);
      if (batch != 1 || queries != keys || key_lengths) {
        refuse("cu_seqlens", "given for a batch of 1, as many queries as keys, and no key_lengths",
               "query " + text(std::get<1>(query)) + " and key " + text(std::get<1>(key)) +
                   (key_lengths ? " with key_lengths" : ""));
      }
    }
    const int64_t sequences = cu_seqlens ? std::get<1>(*cu_seqlens) - 1 : batch;
    check_prompts(prompt_index.has_value(), prompts, sequences);
    sizes = {batch, queries, keys, prompts, prompt_keys, sequences,
             optional_vector<const int64_t>("prompt_index", prompt_index, sequences),
             optional_vector<const int64_t>("prompt_lengths", prompt_lengths, prompts),
             optional_vector<const int64_t>("key_lengths", key_lengths, batch),
             optional_vector<const int64_t>("cu_seqlens", cu_seqlens, sequences + 1)};
    problem.sinks = optional_vector<const float>("sinks", sinks, heads);
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.size = size;
    problem.value_size = value_size;
    problem.causal = causal || window.has_value();
    problem.window = window.value_or(0);
    problem.softcap = static_cast<float>(softcap.value_or(0));
    problem.scale = static_cast<float>(scale);
    problem.threads = threads;
  }

  void forward(const View& out, const Vector& lse) const {
    const ForwardOutputs outputs = {token_major<Strided>("out", out, out_shape()), vector<float>("lse", lse, rows())};
    const py::gil_scoped_release released;
    run_attention_forward(problem, sizes, outputs);
  }

  void backward(const View& out, const View& grad_out, const Vector& lse, const std::optional<Vector>& grad_lse,
                const std::optional<View>& grad_query, const std::optional<View>& grad_key,
                const std::optional<View>& grad_value, const std::optional<View>& grad_prompt_key,
                const std::optional<View>& grad_prompt_value, const std::optional<Vector>& grad_sinks) const {
    check_given_with("sinks", problem.sinks != nullptr, "grad_sinks", grad_sinks.has_value());
    const BackwardInputs inputs = {strided<Strided>("out", out, out_shape()),
                                   strided<Strided>("grad_out", grad_out, out_shape()),
                                   vector<const float>("lse", lse, rows()),
                                   optional_vector<const float>("grad_lse", grad_lse, rows())};
    const auto optional = [](const char* name, const std::optional<View>& view, const Shape& shape) {
      return view ? strided<Strided>(name, *view, shape) : Strided{};
    };
    const auto& [batch, queries, keys, prompts, prompt_keys] =
        std::tie(sizes.batch, sizes.queries, sizes.keys, sizes.prompts, sizes.prompt_keys);
    BackwardOutputs outputs = {};
    if (grad_query) {
      const Shape shape = {batch, problem.heads, queries, problem.size};
      outputs.grad_query = token_major<Strided>("grad_query", *grad_query, shape);
    }
    outputs.grad_key = optional("grad_key", grad_key, {batch, problem.kv_heads, keys, problem.size});
    outputs.grad_value = optional("grad_value", grad_value, {batch, problem.kv_heads, keys, problem.value_size});
    outputs.grad_prompt_key =
        optional("grad_prompt_key", grad_prompt_key, {prompts, problem.kv_heads, prompt_keys, problem.size});
    outputs.grad_prompt_value =
        optional("grad_prompt_value", grad_prompt_value, {prompts, problem.kv_heads, prompt_keys, problem.value_size});
    outputs.grad_sinks = optional_vector<float>("grad_sinks", grad_sinks, problem.heads);
    const py::gil_scoped_release released;
    run_attention_backward(problem, sizes, inputs, outputs);
  }

 private:
  Shape out_shape() const { return {sizes.batch, problem.heads, sizes.queries, problem.value_size}; }
  int64_t rows() const { return sizes.batch * problem.heads * sizes.queries; }

  AttentionProblem problem = {};
  AttentionSizes sizes = {};
};

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<Problem>(module, "AttentionProblem")
      .def(py::init<int, const View&, const View&, const View&, const View&, const View&, const std::optional<Vector>&,
                    const std::optional<Vector>&, const std::optional<Vector>&, const std::optional<Vector>&,
                    const std::optional<Vector>&, bool, std::optional<int64_t>, std::optional<double>, double, int>())
      .def("forward", &Problem::forward)
      .def("backward", &Problem::backward);
}

}  // namespace softprompt
