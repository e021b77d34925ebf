// The loss kernels of the CPU for Python. Pointers come as integers, strides in elements. All that can be checked
// without a look at memory is checked before a kernel runs. While a kernel runs, other threads may use the interpreter.
#include "bindings/checks.h"
#include "cpu/losses/kl.h"

namespace softprompt {
namespace {

void kl_rows(Address student, Address teacher, Address student_bias, Address teacher_bias, Address loss, int64_t rows,
             int64_t vocab, int64_t student_stride, int64_t teacher_stride, int divergence, double beta, float softcap,
             bool gradient, int threads) {
  KlRows call = {};
  check_at_least("rows", rows, 0);
  check_range("vocab", vocab, 1, kMaxSize);
  check_stride("student_stride", student_stride, rows, vocab, true);
  check_stride("teacher_stride", teacher_stride, rows, vocab, true);
  check_threads(threads);
  call.divergence = divergence_of(divergence);
  call.student = pointer<float>("student", student, rows);
  call.teacher = pointer<float>("teacher", teacher, rows);
  call.loss = pointer<float>("loss", loss, rows);
  call.student_bias = optional_pointer<const float>(student_bias);
  call.teacher_bias = optional_pointer<const float>(teacher_bias);
  call.rows = rows, call.vocab = vocab;
  call.student_stride = student_stride, call.teacher_stride = teacher_stride;
  call.beta = beta_of(beta), call.softcap = finite_at_least("softcap", softcap, 0);
  call.gradient = gradient, call.threads = threads;
  const py::gil_scoped_release released;
  run(call);
}

void kl_logits(Address student, Address teacher, Address weights, Address row_scale, Address gradient, Address loss,
               int64_t rows, int64_t vocab, int64_t columns, int64_t student_stride, int64_t teacher_stride,
               int64_t gradient_stride, int student_dtype, int teacher_dtype, int divergence, double beta,
               float temperature, int threads) {
  KlLogits call = {};
  check_at_least("rows", rows, 0);
  check_range("vocab", vocab, 1, kMaxSize);
  check_range("columns", columns, vocab, kMaxSize);
  check_stride("student_stride", student_stride, rows, vocab, false);
  check_stride("teacher_stride", teacher_stride, rows, vocab, false);
  check_threads(threads);
  call.divergence = divergence_of(divergence);
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
  call.beta = beta_of(beta), call.temperature = finite_above("temperature", temperature, 0);
  call.threads = threads;
  const py::gil_scoped_release released;
  run(call);
}

void expectation_rows(Address logits, Address bias, Address labels, Address label_logit, Address row_max,
                      Address row_sum, Address bias_sum, Address mean, int64_t rows, int64_t columns, int64_t size,
                      int64_t stride, int64_t mean_stride, int64_t first_column, float bias_scale, int threads) {
  ExpectationRows call = {};
  check_at_least("rows", rows, 0);
  check_range("columns", columns, 1, kMaxSize);
  check_at_least("size", size, 0);
  check_at_least("first_column", first_column, 0);
  check_stride("stride", stride, rows, columns, true);
  check_stride("mean_stride", mean_stride, rows, size, mean != 0);
  check_threads(threads);
  check_given_together("labels", labels != 0, "label_logit", label_logit != 0);
  check_given_with("bias", bias != 0, "bias_sum", bias_sum != 0);
  call.logits = pointer<float>("logits", logits, rows);
  call.row_max = pointer<float>("row_max", row_max, rows);
  call.row_sum = pointer<double>("row_sum", row_sum, rows);
  call.bias = optional_pointer<const float>(bias);
  call.labels = optional_pointer<const int64_t>(labels);
  call.label_logit = optional_pointer<float>(label_logit);
  call.bias_sum = optional_pointer<double>(bias_sum);
  call.mean = optional_pointer<float>(mean);
  call.rows = rows, call.columns = columns, call.size = size;
  call.stride = stride, call.mean_stride = mean_stride;
  call.first_column = first_column, call.bias_scale = bias_scale;
  call.threads = threads;
  const py::gil_scoped_release released;
  run(call);
}

void kl_tile(Address student, Address teacher, Address student_bias, Address teacher_bias, Address state,
             Address gradient_accumulator, Address mean_accumulator, int64_t rows, int64_t columns, int64_t size,
             int64_t student_stride, int64_t teacher_stride, int64_t gradient_stride, int64_t mean_stride,
             int divergence, float softcap, int threads) {
  KlTile call = {};
  check_at_least("rows", rows, 0);
  check_range("columns", columns, 1, kMaxSize);
  check_at_least("size", size, 0);
  check_stride("student_stride", student_stride, rows, columns, true);
  check_stride("teacher_stride", teacher_stride, rows, columns, true);
  check_stride("gradient_stride", gradient_stride, rows, size, gradient_accumulator != 0);
  check_stride("mean_stride", mean_stride, rows, size, mean_accumulator != 0);
  check_threads(threads);
  check_given_together("gradient_accumulator", gradient_accumulator != 0, "mean_accumulator", mean_accumulator != 0);
  call.student = pointer<float>("student", student, rows);
  call.teacher = pointer<float>("teacher", teacher, rows);
  call.state = pointer<KlTileState>("state", state, rows);
  call.student_bias = optional_pointer<const float>(student_bias);
  call.teacher_bias = optional_pointer<const float>(teacher_bias);
  call.gradient_accumulator = optional_pointer<float>(gradient_accumulator);
  call.mean_accumulator = optional_pointer<float>(mean_accumulator);
  call.rows = rows, call.columns = columns, call.size = size;
  call.student_stride = student_stride, call.teacher_stride = teacher_stride;
  call.gradient_stride = gradient_stride, call.mean_stride = mean_stride;
  call.divergence = kl_of(divergence);
  call.softcap = finite_at_least("softcap", softcap, 0);
  call.threads = threads;
  const py::gil_scoped_release released;
  run(call);
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
             "row_max"_a, "row_sum"_a, "bias_sum"_a, "mean"_a, "rows"_a, "columns"_a, "size"_a, "stride"_a,
             "mean_stride"_a, "first_column"_a, "bias_scale"_a, "threads"_a);
  module.def("kl_tile", kl_tile, py::kw_only(), "student"_a, "teacher"_a, "student_bias"_a, "teacher_bias"_a,
             "state"_a, "gradient_accumulator"_a, "mean_accumulator"_a, "rows"_a, "columns"_a, "size"_a,
             "student_stride"_a, "teacher_stride"_a, "gradient_stride"_a, "mean_stride"_a, "divergence"_a, "softcap"_a,
             "threads"_a);
}

}  // namespace softprompt
