// The Python module of the CPU kernels. It takes addresses, sizes and strides and includes no header of torch, so one
// build works with every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/platform/instruction_set.h"

namespace softprompt {
void bind_attention(pybind11::module_& module);
void bind_kl(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
}  // namespace softprompt

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of softprompt-kernels";
  module.def("instruction_set", [] { return softprompt::kernels().name; }, "the instruction set that runs");
  module.def(
      "instruction_sets",
      [] {
        int count = 0;
        const char* const* names = softprompt::usable_instruction_sets(count);
        return std::vector<std::string>(names, names + count);
      },
      "the instruction sets that were compiled in and that this machine has, widest first");
  softprompt::bind_attention(module);
  softprompt::bind_kl(module);
  softprompt::bind_gemm(module);
}
