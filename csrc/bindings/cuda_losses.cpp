// Python bindings of the row kernels of the losses. Pointers and the stream are integers, strides are in elements. All
// that can be checked without reading memory is checked before a launch.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "cuda/losses/kl.h"

namespace softprompt {
namespace {

using Matrix = std::tuple<Address, int, int64_t, int64_t>;  // address, dtype, strides of rows and columns

constexpr int64_t kMaxRows = kMaxSize;  // blocks of a grid

Dtype dtype_of_matrix(const char* name, int dtype) { return dtype_of(std::string(name) + "'s dtype", dtype); }

// An address must be a multiple of the dtype's size.
void check_address(const char* name, Address address, Dtype dtype) {
  const int64_t bytes = kBytes[static_cast<int>(dtype)];
  if (address % bytes != 0) {
    refuse(std::string(name) + "'s address", "a multiple of " + std::to_string(bytes), std::to_string(address));
  }
}

cudaStream_t stream_of(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

// A matrix that is written: its rows must not overlap, its columns must be dense.
template <class T>
T* written(const char* name, const Matrix& matrix, int64_t rows, int64_t columns) {
  if (columns > 1 && std::get<3>(matrix) != 1) {
    refuse(std::string(name) + "'s last stride", "1", std::to_string(std::get<3>(matrix)));
  }
  check_stride(std::string(name) + "'s row stride", std::get<2>(matrix), rows, columns, true);
  check_address(name, std::get<0>(matrix), dtype_of_matrix(name, std::get<1>(matrix)));
  return pointer<T>(name, std::get<0>(matrix), rows * columns);
}

LogitRows logits_of(const char* name, const Matrix& matrix, Address bias, int64_t rows, int64_t vocab) {
  const auto [address, dtype, stride, column_stride] = matrix;
  check_stride(std::string(name) + "'s row stride", stride, rows, vocab, false);
  check_stride(std::string(name) + "'s column stride", column_stride, vocab, 1, false);
  check_address(name, address, dtype_of_matrix(name, dtype));
  return {pointer<const void>(name, address, rows * vocab), dtype_of_matrix(name, dtype), stride, column_stride,
          optional_pointer<const float>(bias)};
}

void bound_divergence_rows(int kind, const Matrix& student, const Matrix& teacher, Address student_bias,
                           Address teacher_bias, Address weights, Address row_scale, Address statistics, Address loss,
                           const std::optional<Matrix>& gradient, int64_t rows, int64_t vocab, int64_t columns,
                           double scale, double inner, bool capped, bool negated, double beta, double loss_scale,
                           double gradient_scale, Address stream) {
  const Divergence divergence = divergence_of(kind);
  check_range("rows", rows, 0, kMaxRows);
  check_range("vocab", vocab, 1, kMaxSize);
  if (loss == 0 && statistics == 0 && rows != 0) refuse("statistics", "given where there is no loss", "none");
  DivergenceRows call = {};
  call.student = logits_of("student", student, student_bias, rows, vocab);
  call.teacher = logits_of("teacher", teacher, teacher_bias, rows, vocab);
  call.weights = optional_pointer<const float>(weights);
  call.row_scale = optional_pointer<const float>(row_scale);
  call.statistics = optional_pointer<float>(statistics);
  call.loss = optional_pointer<float>(loss);
  if (gradient) {
    check_range("columns", columns, vocab, kMaxSize);
    call.gradient = written<void>("gradient", *gradient, rows, columns);
    call.gradient_dtype = dtype_of_matrix("gradient", std::get<1>(*gradient));
    call.gradient_stride = std::get<2>(*gradient);
  }
  call.rows = rows, call.vocab = vocab, call.columns = columns;
  call.scale = finite_at_least("scale", scale, std::numeric_limits<float>::min());
  call.inner = finite("inner", inner);
  call.beta = static_cast<float>(beta_of(beta)), call.capped = capped, call.negated = negated;
  call.loss_scale = finite("loss_scale", loss_scale), call.gradient_scale = finite("gradient_scale", gradient_scale);
  const py::gil_scoped_release released;
  divergence_rows(divergence, call, stream_of(stream));
}

void bound_exponential_rows(const Matrix& products, Address bias, Address weights, Address labels, Address row_max,
                            Address row_sum, Address bias_sum, Address label_logit, Address mean, int64_t mean_stride,
                            int64_t size, const std::optional<Matrix>& high, const std::optional<Matrix>& low,
                            int64_t rows, int64_t columns, int64_t first, double scale, double part_scale,
                            Address stream) {
  check_range("rows", rows, 0, kMaxRows);
  check_range("columns", columns, 1, kMaxSize);
  check_at_least("size", size, 0);
  check_at_least("first", first, 0);
  check_choice("products' dtype", std::get<1>(products), {kFloat32});
  check_given_with("labels", labels != 0, "label_logit", label_logit != 0);
  ExponentialRows call = {};
  call.products = written<const float>("products", products, rows, columns);
  call.products_stride = std::get<2>(products);
  call.bias = optional_pointer<const float>(bias);
  call.weights = optional_pointer<const float>(weights);
  call.labels = optional_pointer<const int64_t>(labels);
  call.row_max = pointer<float>("row_max", row_max, rows);
  call.row_sum = pointer<double>("row_sum", row_sum, rows);
  call.bias_sum = optional_pointer<double>(bias_sum);
  call.label_logit = optional_pointer<float>(label_logit);
  if (mean != 0) {
    check_stride("mean_stride", mean_stride, rows, size, true);
    call.mean = optional_pointer<float>(mean);
  }
  if (high) {
    call.high = written<void>("high", *high, rows, columns);
    call.high_stride = std::get<2>(*high);
    call.part_dtype = dtype_of_matrix("high", std::get<1>(*high));
  }
  if (low) {
    check_given_with("high", high.has_value(), "low", true);
    const Dtype dtype = dtype_of_16_bits("low's dtype", std::get<1>(*low));
    if (dtype != call.part_dtype) refuse("low's dtype", "that of high", std::to_string(std::get<1>(*low)));
    call.low = written<void>("low", *low, rows, columns);
    call.low_stride = std::get<2>(*low);
  }
  call.rows = rows, call.columns = columns, call.size = size, call.mean_stride = mean_stride, call.first = first;
  call.scale = finite("scale", scale), call.part_scale = finite_at_least("part_scale", part_scale, 0);
  const py::gil_scoped_release released;
  exponential_rows(call, stream_of(stream));
}

}  // namespace

void bind_kl(py::module_& module) {
  using namespace pybind11::literals;
  module.def("divergence_rows", &bound_divergence_rows, py::kw_only(), "kind"_a, "student"_a, "teacher"_a,
             "student_bias"_a, "teacher_bias"_a, "weights"_a, "row_scale"_a, "statistics"_a, "loss"_a,
             "gradient"_a.none(true), "rows"_a, "vocab"_a, "columns"_a, "scale"_a, "inner"_a, "capped"_a, "negated"_a,
             "beta"_a, "loss_scale"_a, "gradient_scale"_a, "stream"_a);
  module.def("exponential_rows", &bound_exponential_rows, py::kw_only(), "products"_a, "bias"_a, "weights"_a,
             "labels"_a, "row_max"_a, "row_sum"_a, "bias_sum"_a, "label_logit"_a, "mean"_a, "mean_stride"_a, "size"_a,
             "high"_a.none(true), "low"_a.none(true), "rows"_a, "columns"_a, "first"_a, "scale"_a, "part_scale"_a,
             "stream"_a);
}

}  // namespace softprompt
