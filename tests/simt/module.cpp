// The Python module of the test kernels and csrc/simt.
#include <pybind11/pybind11.h>

#include "simt/formats.h"
#include "test_kernels.h"

namespace softprompt {
void bind_simt(pybind11::module_& module);
}

PYBIND11_MODULE(simt_test_kernels, module) {
  using namespace softprompt;
  bind_simt(module);
  module.def("gemm", &run_gemm, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("run", &run_kernel, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("convert", [](uintptr_t from, uintptr_t to, int64_t count, bool bfloat16, bool widen) {
    auto* wide = reinterpret_cast<float*>(widen ? to : from);
    auto* narrow = reinterpret_cast<uint16_t*>(widen ? from : to);
    for (int64_t i = 0; i < count; ++i) {
      if (widen) {
        wide[i] = bfloat16 ? simt::from_bfloat16(narrow[i]) : simt::from_float16(narrow[i]);
      } else {
        narrow[i] = bfloat16 ? simt::to_bfloat16(wide[i]) : simt::to_float16(wide[i]);
      }
    }
  });
}
