// What the bindings check of addresses, sizes and strides before any pointer is followed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace softprompt {

namespace py = pybind11;
using Address = std::uintptr_t;

constexpr int kMostThreads = 4096;

inline void require(bool holds, const std::string& name, const std::string& accepted, const std::string& got) {
  if (!holds) throw std::invalid_argument(name + " must be " + accepted + "; got " + got);
}

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  require(value >= least && value <= most, name, "in [" + std::to_string(least) + ", " + std::to_string(most) + "]",
          std::to_string(value));
}

inline void check_count(const char* name, int64_t value) { check_range(name, value, 0, std::numeric_limits<int64_t>::max()); }

// Strides of rows of `columns` elements: rows that are only read may overlap, others may not.
inline void check_stride(const char* name, int64_t stride, int64_t rows, int64_t columns, bool written) {
  if (rows <= 1) return;
  const int64_t least = written ? columns : 0, most = std::numeric_limits<int64_t>::max() / 8 / rows;
  check_range(name, stride, least, most);
}

// An array of `count` elements.
template <class T>
T* pointer(const char* name, Address address, int64_t count) {
  require(address != 0 || count == 0, name, "an address", "0");
  return reinterpret_cast<T*>(address);
}

template <class T>
T* optional_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_of(const char* name, int dtype) {
  check_range(name, dtype, 0, 2);
  return static_cast<Dtype>(dtype);
}

// Runs a call while others may use the interpreter.
template <class Call>
void run_released(const Call& call) {
  const py::gil_scoped_release released;
  run(call);
}

}  // namespace softprompt
