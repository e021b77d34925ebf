// The Python module of the CPU kernels: raw pointers, sizes and strides, no torch headers.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace softprompt {
void bind_kl(pybind11::module_& module);
}

PYBIND11_MODULE(_native, module) {
  module.def("instruction_set", [] { return softprompt::kernels().name; });
  softprompt::bind_kl(module);
}
