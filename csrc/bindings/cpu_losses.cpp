// Python functions of the KL kernels. Pointers are given as integers, strides in elements; everything that can be
// checked without looking at memory is checked before a kernel runs, and the interpreter is free while one does.
#include "bindings/checks.h"
#include "cpu/losses/kl.h"

namespace softprompt {
namespace {

namespace py = pybind11;
Divergence divergence_of(int kind, double beta) {
  check_range("divergence", kind, 0, 2);
  require(beta >= 0 && beta <= 1, "beta", "in [0, 1]", std::to_string(beta));
  return static_cast<Divergence>(kind);
}

void kl_rows(Address student, Address teacher, Address student_bias, Address teacher_bias, Address loss, int64_t rows,
             int64_t vocab, int64_t student_stride, int64_t teacher_stride, int divergence, double beta, float softcap,
             bool gradient, int threads) {
  KlRows call = {};
  check_count("rows", rows);
  check_range("vocab", vocab, 1, std::numeric_limits<int32_t>::max());
  check_stride("student_stride", student_stride, rows, vocab, true);
  check_stride("teacher_stride", teacher_stride, rows, vocab, true);
  check_range("threads", threads, 1, kMostThreads);
  require(softcap >= 0 && softcap <= std::numeric_limits<float>::max(), "softcap", "finite and at least 0",
          std::to_string(softcap));
  call.divergence = divergence_of(divergence, beta);
  call.student = pointer<float>("student", student, rows);
  call.teacher = pointer<float>("teacher", teacher, rows);
  call.loss = pointer<float>("loss", loss, rows);
  call.student_bias = optional_pointer<const float>(student_bias);
  call.teacher_bias = optional_pointer<const float>(teacher_bias);
  call.rows = rows, call.vocab = vocab;
  call.student_stride = student_stride, call.teacher_stride = teacher_stride;
  call.beta = beta, call.softcap = softcap;
  call.gradient = gradient, call.threads = threads;
  run_released(call);
}

void kl_logits(Address student, Address teacher, Address weights, Address row_scale, Address gradient, Address loss,
               int64_t rows, int64_t vocab, int64_t columns, int64_t student_stride, int64_t teacher_stride,
               int64_t gradient_stride, int student_dtype, int teacher_dtype, int divergence, double beta,
               float temperature, int threads) {
  KlLogits call = {};
  check_count("rows", rows);
  check_range("vocab", vocab, 1, std::numeric_limits<int32_t>::max());
  check_range("columns", columns, vocab, std::numeric_limits<int32_t>::max());
  check_stride("student_stride", student_stride, rows, vocab, false);
  check_stride("teacher_stride", teacher_stride, rows, vocab, false);
  check_range("threads", threads, 1, kMostThreads);
  require(temperature > 0 && temperature <= std::numeric_limits<float>::max(), "temperature", "finite and above 0",
          std::to_string(temperature));
  call.divergence = divergence_of(divergence, beta);
  call.student_dtype = dtype_of("student_dtype", student_dtype);
  call.teacher_dtype = dtype_of("teacher_dtype", teacher_dtype);
  call.student = pointer<const void>("student", student, rows);
  call.teacher = pointer<const void>("teacher", teacher, rows);
  call.weights = optional_pointer<const float>(weights);
  if (gradient != 0) {
    check_stride("gradient_stride", gradient_stride, rows, columns, true);
    call.gradient = optional_pointer<void>(gradient);
    call.row_scale = pointer<const float>("row_scale", row_scale, rows);
  } else {
    call.loss = pointer<float>("loss", loss, rows);
  }
  call.rows = rows, call.vocab = vocab, call.columns = columns;
  call.student_stride = student_stride, call.teacher_stride = teacher_stride, call.gradient_stride = gradient_stride;
  call.beta = beta, call.temperature = temperature;
  call.threads = threads;
  run_released(call);
}

void expectation_rows(Address logits, Address bias, Address labels, Address label_logit, Address largest, Address total,
                      Address bias_total, Address sum, int64_t rows, int64_t columns, int64_t size, int64_t stride,
                      int64_t sum_stride, int64_t first_column, float bias_scale, int threads) {
  ExpectationRows call = {};
  check_count("rows", rows);
  check_range("columns", columns, 1, std::numeric_limits<int32_t>::max());
  check_count("size", size);
  check_count("first_column", first_column);
  check_stride("stride", stride, rows, columns, true);
  check_stride("sum_stride", sum_stride, rows, size, sum != 0);
  check_range("threads", threads, 1, kMostThreads);
  require((labels == 0) == (label_logit == 0), "labels and label_logit", "given together", "one of them");
  require(bias_total == 0 || bias != 0, "bias", "given with bias_total", "none");
  call.logits = pointer<float>("logits", logits, rows);
  call.largest = pointer<float>("largest", largest, rows);
  call.total = pointer<double>("total", total, rows);
  call.bias = optional_pointer<const float>(bias);
  call.labels = optional_pointer<const int64_t>(labels);
  call.label_logit = optional_pointer<float>(label_logit);
  call.bias_total = optional_pointer<double>(bias_total);
  call.sum = optional_pointer<float>(sum);
  call.rows = rows, call.columns = columns, call.size = size;
  call.stride = stride, call.sum_stride = sum_stride;
  call.first_column = first_column, call.bias_scale = bias_scale;
  call.threads = threads;
  run_released(call);
}

void kl_tile(Address student, Address teacher, Address student_bias, Address teacher_bias, Address so_far, Address sum,
             Address total, int64_t rows, int64_t columns, int64_t size, int64_t student_stride, int64_t teacher_stride,
             int64_t sum_stride, int64_t total_stride, int divergence, float softcap, int threads) {
  KlTile call = {};
  check_count("rows", rows);
  check_range("columns", columns, 1, std::numeric_limits<int32_t>::max());
  check_count("size", size);
  check_stride("student_stride", student_stride, rows, columns, true);
  check_stride("teacher_stride", teacher_stride, rows, columns, true);
  check_stride("sum_stride", sum_stride, rows, size, sum != 0);
  check_stride("total_stride", total_stride, rows, size, total != 0);
  check_range("divergence", divergence, 0, 1);
  check_range("threads", threads, 1, kMostThreads);
  require(softcap >= 0 && softcap <= std::numeric_limits<float>::max(), "softcap", "finite and at least 0",
          std::to_string(softcap));
  require((sum == 0) == (total == 0), "sum and total", "given together", "one of them");
  call.student = pointer<float>("student", student, rows);
  call.teacher = pointer<float>("teacher", teacher, rows);
  call.so_far = pointer<KlSoFar>("so_far", so_far, rows);
  call.student_bias = optional_pointer<const float>(student_bias);
  call.teacher_bias = optional_pointer<const float>(teacher_bias);
  call.sum = optional_pointer<float>(sum);
  call.total = optional_pointer<float>(total);
  call.rows = rows, call.columns = columns, call.size = size;
  call.student_stride = student_stride, call.teacher_stride = teacher_stride;
  call.sum_stride = sum_stride, call.total_stride = total_stride;
  call.divergence = static_cast<Divergence>(divergence);
  call.softcap = softcap, call.threads = threads;
  run_released(call);
}

}  // namespace

void bind_kl(py::module_& module) {
  using py::literals::operator""_a;
  module.def("kl_rows", kl_rows, py::kw_only(), "student"_a, "teacher"_a, "student_bias"_a, "teacher_bias"_a, "loss"_a,
             "rows"_a, "vocab"_a, "student_stride"_a, "teacher_stride"_a, "divergence"_a, "beta"_a, "softcap"_a,
             "gradient"_a, "threads"_a);
  module.def("kl_logits", kl_logits, py::kw_only(), "student"_a, "teacher"_a, "weights"_a, "row_scale"_a, "gradient"_a,
             "loss"_a, "rows"_a, "vocab"_a, "columns"_a, "student_stride"_a, "teacher_stride"_a, "gradient_stride"_a,
             "student_dtype"_a, "teacher_dtype"_a, "divergence"_a, "beta"_a, "temperature"_a, "threads"_a);
  module.def("expectation_rows", expectation_rows, py::kw_only(), "logits"_a, "bias"_a, "labels"_a, "label_logit"_a,
             "largest"_a, "total"_a, "bias_total"_a, "sum"_a, "rows"_a, "columns"_a, "size"_a, "stride"_a,
             "sum_stride"_a, "first_column"_a, "bias_scale"_a, "threads"_a);
  module.def("kl_tile", kl_tile, py::kw_only(), "student"_a, "teacher"_a, "student_bias"_a, "teacher_bias"_a,
             "so_far"_a, "sum"_a, "total"_a, "rows"_a, "columns"_a, "size"_a, "student_stride"_a, "teacher_stride"_a,
             "sum_stride"_a, "total_stride"_a, "divergence"_a, "softcap"_a, "threads"_a);
}

}  // namespace softprompt
