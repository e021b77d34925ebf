// The GEMM of the CPU for Python.
#include "bindings/checks.h"
#include "cpu/gemm/gemm.h"

namespace softprompt {
namespace {

void gemm(Address out, Address left, Address right, int64_t rows, int64_t depth, int64_t columns, int64_t out_stride,
          int64_t left_stride, int64_t right_stride, int right_dtype, bool right_transposed, bool accumulate,
          int threads) {
  Gemm call = {};
  const int64_t right_rows = right_transposed ? columns : depth, right_columns = right_transposed ? depth : columns;
  check_range("rows", rows, 0, kMaxSize);
  check_range("depth", depth, 0, kMaxSize);
  check_range("columns", columns, 0, kMaxSize);
  check_stride("out_stride", out_stride, rows, columns, true);
  check_stride("left_stride", left_stride, rows, depth, false);
  check_stride("right_stride", right_stride, right_rows, right_columns, false);
  check_threads(threads);
  call.out = pointer<float>("out", out, rows * columns);
  call.a = pointer<const float>("left", left, rows * depth);
  call.b = pointer<const void>("right", right, depth * columns);
  call.rows = rows, call.depth = depth, call.columns = columns;
  call.out_stride = out_stride, call.a_stride = left_stride, call.b_stride = right_stride;
  call.b_dtype = dtype_of("right_dtype", right_dtype);
  call.b_transposed = right_transposed, call.accumulate = accumulate;
  call.threads = threads;
  const py::gil_scoped_release released;
  run(call);
}

}  // namespace

void bind_gemm(py::module_& module) {
  using py::literals::operator""_a;
  module.def("has_gemm", has_gemm, "whether `gemm` can be called");
  module.def("has_fast_gemm", has_fast_gemm, "whether `gemm` is faster than MKL on this processor");
  module.def("gemm", gemm, py::kw_only(), "out"_a, "left"_a, "right"_a, "rows"_a, "depth"_a, "columns"_a,
             "out_stride"_a, "left_stride"_a, "right_stride"_a, "right_dtype"_a, "right_transposed"_a, "accumulate"_a,
             "threads"_a);
}

}  // namespace softprompt
