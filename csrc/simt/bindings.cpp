// Python bindings of the checks and counters of csrc/simt, for the module that holds the kernels.
#include <pybind11/pybind11.h>

#include "simt/checks/counters.h"
#include "simt/checks/error.h"
#include "simt/checks/memory.h"
#include "simt/runtime/grid.h"

namespace py = pybind11;

namespace softprompt {

void bind_simt(py::module_& module) {
  using namespace softprompt::simt;
  static py::exception<KernelError> error_type(module, "SimtError", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const KernelError& error) {
      py::set_error(error_type, error.what());
    }
  });
  module.def("register", &register_memory, py::arg("address"), py::arg("bytes"), py::arg("writable"),
             "lets the launches that follow access this memory");
  module.def("unregister", &unregister_memory, py::arg("address"));
  module.def("seed", &set_seed, py::arg("seed"), "sets the seed of the order in which blocks and warps run");
  module.def("count", &set_counting, py::arg("on"), "turns counting on or off. It makes launches slower");
  module.def("reset_counters", &reset_counters);
  module.def("counters", [] {
    const Counters c = counters();
    py::dict found;
    found["launches"] = c.launches;
    found["blocks"] = c.blocks;
    found["barriers"] = c.barriers;
    found["max_shared_bytes"] = c.max_shared_bytes;
    found["loaded_bytes"] = c.loaded_bytes;
    found["stored_bytes"] = c.stored_bytes;
    found["loaded_sectors"] = c.loaded_sectors;
    found["stored_sectors"] = c.stored_sectors;
    found["shared_passes"] = c.shared_passes;
    found["shared_conflicts"] = c.shared_conflicts;
    found["matrix_conflicts"] = c.matrix_conflicts;
    found["copy_conflicts"] = c.copy_conflicts;
    found["mma"] = c.mma;
    found["atomics"] = c.atomics;
    return found;
  });
  module.def("traffic", [] {
    py::dict found;
    for (const Traffic& each : traffic()) found[py::int_(each.address)] = py::make_tuple(each.loaded, each.stored);
    return found;
  }, "{address: (bytes loaded, bytes stored)} of each registered buffer, since its registration");
}

}  // namespace softprompt
