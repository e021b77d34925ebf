// The checks and counters of csrc/simt for Python, beside the kernels that they are of.
#include <pybind11/pybind11.h>

#include "simt/checks/counters.h"
#include "simt/checks/fault.h"
#include "simt/runtime/grid.h"
#include "simt/checks/memory.h"

namespace py = pybind11;

namespace softprompt {

void bind_simt(py::module_& module) {
  using namespace softprompt::simt;
  static py::exception<Fault> fault(module, "SimtFault", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const Fault& error) {
      py::set_error(fault, error.what());
    }
  });
  module.def("register", &register_memory, py::arg("address"), py::arg("bytes"), py::arg("writable"),
             "makes memory known to the launches that follow");
  module.def("unregister", &unregister_memory, py::arg("address"));
  module.def("seed", &set_seed, py::arg("seed"), "of the order in which blocks and warps run");
  module.def("count", &set_counting, py::arg("on"), "whether launches are counted, which makes them slower");
  module.def("reset_counters", &reset_counters);
  module.def("counters", [] {
    const Counters c = counters();
    py::dict found;
    found["launches"] = c.launches;
    found["blocks"] = c.blocks;
    found["barriers"] = c.barriers;
    found["most_shared_bytes"] = c.most_shared_bytes;
    found["loaded_bytes"] = c.loaded_bytes;
    found["stored_bytes"] = c.stored_bytes;
    found["loaded_sectors"] = c.loaded_sectors;
    found["stored_sectors"] = c.stored_sectors;
    found["shared_passes"] = c.shared_passes;
    found["shared_conflicts"] = c.shared_conflicts;
    found["matrix_conflicts"] = c.matrix_conflicts;
    found["copy_conflicts"] = c.copy_conflicts;
    found["products"] = c.products;
    found["atomics"] = c.atomics;
    return found;
  });
  module.def("traffic", [] {
    py::dict found;
    for (const Traffic& each : traffic()) found[py::int_(each.address)] = py::make_tuple(each.loaded, each.stored);
    return found;
  }, "bytes loaded and stored of each registered piece since it was");
}

}  // namespace softprompt
