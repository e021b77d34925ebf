// The Python module of the CUDA kernels, and, built with SPK_SIMT, of the same kernels on the host (csrc/simt).
//
// It knows addresses, sizes, strides and streams, but no torch, and carries the CUDA runtime within, so that it can be
// imported on a machine without a driver.
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

// Why kernels cannot run, in CUDA's own words; empty if they can.
std::string device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "" : "there is no device";
  cudaGetLastError();
  std::string problem = cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    const std::string version = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 100 / 10);
    problem += " (there is no NVIDIA driver, or one older than that of CUDA " + version + ", which this was built with)";
  }
  return problem;
}

}  // namespace

PYBIND11_MODULE(SPK_MODULE, module) {
  module.doc() = "CUDA kernels of softprompt-kernels";
  module.attr("archs") = SPK_CUDA_ARCHS;  // that it was built for, as in "80;90"
  module.def("device_problem", &device_problem, "why kernels cannot run here, '' if they can");
softprompt::bind_attention(module);
  softprompt::bind_kl(module);
#ifdef SPK_SIMT
  softprompt::bind_simt(module);
#endif
}
