// Python bindings of the CUDA attention kernels. They take raw pointers, sizes, strides and a stream, and check them
// before any launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/checks.h"
#include "bindings/views.h"
#include "cuda/attention/problem.h"

namespace softprompt {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // see cuda/attention/problem.h
constexpr int64_t kMaxBlocks = kMaxSize, kMaxHeads = 65535;
constexpr int64_t kAlignment = 8;  // 16-bit elements in 16 bytes

// A tensor whose rows begin at multiples of 16 bytes.
HeadTensor aligned(const char* name, const View& view, const Shape& expected) {
  const auto tensor = strided<HeadTensor>(name, view, expected);
  const auto& [address, sizes, strides] = view;
  if (sizes[0] * sizes[1] * sizes[2] * sizes[3] == 0) return tensor;
  bool aligned = address % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (sizes[i] <= 1 || strides[i] % kAlignment == 0);
  if (!aligned) refuse(name, "a tensor whose rows begin at multiples of 16 bytes", "strides " + text(strides));
  return tensor;
}

// The inputs of forward and backward, as one object that Python makes for each call.
class Problem {
 public:
  Problem(int dtype, const View& query, const View& key, const View& value, const View& prompt_key,
          const View& prompt_value, const std::optional<Vector>& prompt_index,
          const std::optional<Vector>& prompt_lengths, const std::optional<Vector>& key_lengths, bool causal,
          std::optional<int64_t> window, std::optional<double> softcap, double scale) {
    problem_.dtype = dtype_of_16_bits("dtype", dtype);
    const auto [batch, heads, queries, size] = std::get<1>(query);
    const auto [key_batch, kv_heads, keys, key_size] = std::get<1>(key);
    const auto [prompts, prompt_heads, prompt_keys, prompt_size] = std::get<1>(prompt_key);
    if (size != 64 && size != 96 && size != 128) refuse("query's head size", "64, 96 or 128", std::to_string(size));
    check_range("key's heads", kv_heads, 1, kMaxHeads);
    const int64_t group = group_of(heads, kv_heads);
    check_range("query's rows per key head", queries * group, 0, kMaxTokens);
    check_range("positions", prompt_keys + keys + queries, 0, kMaxTokens);
    check_range("query's batch", batch, 0, kMaxTokens);
    check_prompts(prompt_index.has_value(), prompts, batch);
    if (window) check_at_least("window", *window, 1);
    problem_.query = aligned("query", query, {batch, heads, queries, size});
    problem_.key = aligned("key", key, {batch, kv_heads, keys, size});
    problem_.value = aligned("value", value, {batch, kv_heads, keys, size});
    problem_.prompt_key = aligned("prompt_key", prompt_key, {prompts, kv_heads, prompt_keys, size});
    problem_.prompt_value = aligned("prompt_value", prompt_value, {prompts, kv_heads, prompt_keys, size});
    problem_.prompt_index = optional_vector<const int64_t>("prompt_index", prompt_index, batch);
    problem_.prompt_lengths = optional_vector<const int64_t>("prompt_lengths", prompt_lengths, prompts);
    problem_.key_lengths = optional_vector<const int64_t>("key_lengths", key_lengths, batch);
    problem_.batch = static_cast<int>(batch), problem_.heads = static_cast<int>(heads);
    problem_.kv_heads = static_cast<int>(kv_heads), problem_.group = static_cast<int>(group);
    problem_.head_size = static_cast<int>(size), problem_.queries = static_cast<int>(queries);
    problem_.keys = static_cast<int>(keys), problem_.prompts = static_cast<int>(prompts);
    problem_.prompt_keys = static_cast<int>(prompt_keys);
    problem_.causal = causal || window;
    // A larger window has the same effect: no two positions are further apart.
    problem_.window = window ? static_cast<int>(std::min(*window, prompt_keys + keys + queries + 1)) : 0;
    problem_.softcap = static_cast<float>(softcap.value_or(0));
    problem_.scale = static_cast<float>(scale);
    check_range("row tiles", (queries * group / 64 + 1) * batch, 0, kMaxBlocks);
  }

  void forward(const View& out, const Vector& lse, Address stream) const {
    const AttentionOutputs outputs = {aligned("out", out, rows_shape()), vector<float>("lse", lse, rows())};
    const py::gil_scoped_release released;
    attention_forward(problem_, outputs, reinterpret_cast<cudaStream_t>(stream));
  }

  void backward(const View& out, const View& grad_out, const Vector& lse, const std::optional<Vector>& grad_lse,
                const Vector& delta, int splits, const std::optional<Vector>& prompt_key_partials,
                const std::optional<Vector>& prompt_value_partials, const std::optional<View>& query,
                const std::optional<View>& key, const std::optional<View>& value, const std::optional<View>& prompt_key,
                const std::optional<View>& prompt_value, Address stream) const {
    const Shape own = {problem_.batch, problem_.kv_heads, problem_.keys, problem_.head_size};
    const Shape prompt = {problem_.prompts, problem_.kv_heads, problem_.prompt_keys, problem_.head_size};
    const int64_t gradient_size = prompt[0] * prompt[1] * prompt[2] * prompt[3];
    check_range("splits", splits, 1, 1024);
    const int64_t key_tiles = (own[2] / 64 + 1) * own[0] + (prompt[2] / 64 + 1) * prompt[0] * splits;
    check_range("key tiles", key_tiles, 0, kMaxBlocks);
    if (splits > 1) {
      check_given_with("prompt_key_partials", prompt_key_partials.has_value(), "several splits",
                       prompt_key.has_value());
      check_given_with("prompt_value_partials", prompt_value_partials.has_value(), "several splits",
                       prompt_value.has_value());
    }
    const auto optional = [](const char* name, const std::optional<View>& view, const Shape& shape) {
      return view ? aligned(name, *view, shape) : HeadTensor{};
    };
    const AttentionBackward call = {
        aligned("out", out, rows_shape()),
        aligned("grad_out", grad_out, rows_shape()),
        vector<const float>("lse", lse, rows()),
        optional_vector<const float>("grad_lse", grad_lse, rows()),
        vector<float>("delta", delta, rows()),
        splits,
        optional_vector<float>("prompt_key_partials", prompt_key_partials, splits * gradient_size),
        optional_vector<float>("prompt_value_partials", prompt_value_partials, splits * gradient_size),
        {optional("grad_query", query, rows_shape()), optional("grad_key", key, own),
         optional("grad_value", value, own), optional("grad_prompt_key", prompt_key, prompt),
         optional("grad_prompt_value", prompt_value, prompt)}};
    const py::gil_scoped_release released;
    attention_backward(problem_, call, reinterpret_cast<cudaStream_t>(stream));
  }

 private:
  Shape rows_shape() const { return {problem_.batch, problem_.heads, problem_.queries, problem_.head_size}; }
  int64_t rows() const { return int64_t{problem_.batch} * problem_.heads * problem_.queries; }

  AttentionProblem problem_ = {};
};

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<Problem>(module, "AttentionProblem")
      .def(py::init<int, const View&, const View&, const View&, const View&, const View&, const std::optional<Vector>&,
                    const std::optional<Vector>&, const std::optional<Vector>&, bool, std::optional<int64_t>,
                    std::optional<double>, double>())
      .def("forward", &Problem::forward)
      .def("backward", &Problem::backward);
}

}  // namespace softprompt
