// The Python module of the CUDA kernels, and, built with SPK_SIMT, of the same kernels on the host (csrc/simt).
//
// It takes addresses, sizes, strides and streams and does not use torch. The CUDA runtime is linked statically, so the
// module can be imported on a machine without a driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <string>

namespace softprompt {
void bind_attention(pybind11::module_& module);
void bind_kl(pybind11::module_& module);
#ifdef SPK_SIMT
void bind_simt(pybind11::module_& module);
#endif
}  // namespace softprompt

#ifdef SPK_SIMT
#define SPK_MODULE _simt
#define SPK_CUDA_ARCHS ""
#else
#define SPK_MODULE _native
#endif

namespace {

// Why kernels cannot run, in the words of the CUDA runtime. Empty if they can.
std::string device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "" : "there is no device";
  cudaGetLastError();
  std::string problem = cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    const std::string version = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 100 / 10);
    problem += " (no NVIDIA driver, or one too old for CUDA " + version + ", which this module was built with)";
  }
  return problem;
}

}  // namespace

PYBIND11_MODULE(SPK_MODULE, module) {
  module.doc() = "CUDA kernels of softprompt-kernels";
  module.attr("archs") = SPK_CUDA_ARCHS;  // that the module was built for, such as "80;90"
  module.def("device_problem", &device_problem, "why kernels cannot run here, '' if they can");
  softprompt::bind_attention(module);
  softprompt::bind_kl(module);
#ifdef SPK_SIMT
  softprompt::bind_simt(module);
#endif
}
