// What the bindings of all kernels check before they follow a pointer: numbers, sizes, strides and addresses.
//
// Each check throws std::invalid_argument, a ValueError in Python. Its message has one form:
//
//     NAME must be ACCEPTED; got GOT
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include "tensor.h"

namespace softprompt {

namespace py = pybind11;
using Address = std::uintptr_t;

constexpr int kMaxThreads = 4096;
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();  // of a dimension that kernels count in 32 bits

[[noreturn]] inline void refuse(std::string_view name, std::string_view accepted, std::string_view got) {
  throw std::invalid_argument(std::string(name).append(" must be ").append(accepted).append("; got ").append(got));
}

// --- integers --------------------------------------------------------------------------------------------------------

inline void check_at_least(std::string_view name, int64_t value, int64_t least) {
  if (value < least) refuse(name, "at least " + std::to_string(least), std::to_string(value));
}

inline void check_range(std::string_view name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  refuse(name, "in [" + std::to_string(least) + ", " + std::to_string(most) + "]", std::to_string(value));
}

inline void check_threads(int threads) { check_range("threads", threads, 1, kMaxThreads); }

// The stride of rows of `columns` elements. Rows that a kernel only reads may overlap, rows that it writes may not.
inline void check_stride(std::string_view name, int64_t stride, int64_t rows, int64_t columns, bool written) {
  if (rows <= 1) return;
  check_range(name, stride, written ? columns : 0, std::numeric_limits<int64_t>::max() / 8 / rows);
}

// --- floating-point numbers ------------------------------------------------------------------------------------------

inline std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", value);
  return digits;
}

inline bool fits_float(double value) {
  constexpr double most = std::numeric_limits<float>::max();
  return value >= -most && value <= most;
}

inline float finite(std::string_view name, double value) {
  if (!fits_float(value)) refuse(name, "finite", text(value));
  return static_cast<float>(value);
}

inline float finite_at_least(std::string_view name, double value, double least) {
  if (!(fits_float(value) && value >= least)) refuse(name, "finite and at least " + text(least), text(value));
  return static_cast<float>(value);
}

inline float finite_above(std::string_view name, double value, double bound) {
  if (!(fits_float(value) && value > bound)) refuse(name, "finite and above " + text(bound), text(value));
  return static_cast<float>(value);
}

inline double beta_of(double beta) {
  if (!(beta >= 0 && beta <= 1)) refuse("beta", "in [0, 1]", text(beta));
  return beta;
}

// --- enumerations ----------------------------------------------------------------------------------------------------

struct Choice {
  int number;
  const char* name;
};

// Refuses a number that is not one of `choices`, and names all of them.
inline void check_choice(std::string_view name, int number, std::initializer_list<Choice> choices) {
  std::string accepted;
  for (const Choice& choice : choices) {
    if (choice.number == number) return;
    accepted += (accepted.empty() ? "" : ", ") + std::to_string(choice.number) + " (" + choice.name + ")";
  }
  refuse(name, "one of " + accepted, std::to_string(number));
}

constexpr Choice kFloat32 = {static_cast<int>(Dtype::float32), "float32"};
constexpr Choice kBFloat16 = {static_cast<int>(Dtype::bfloat16), "bfloat16"};
constexpr Choice kFloat16 = {static_cast<int>(Dtype::float16), "float16"};

constexpr Choice kForward = {static_cast<int>(Divergence::forward), "forward"};
constexpr Choice kReverse = {static_cast<int>(Divergence::reverse), "reverse"};
constexpr Choice kJsd = {static_cast<int>(Divergence::jsd), "jsd"};

inline Dtype dtype_of(std::string_view name, int number) {
  check_choice(name, number, {kFloat32, kBFloat16, kFloat16});
  return static_cast<Dtype>(number);
}

inline Dtype dtype_of_16_bits(std::string_view name, int number) {
  check_choice(name, number, {kBFloat16, kFloat16});
  return static_cast<Dtype>(number);
}

inline Divergence divergence_of(int number) {
  check_choice("divergence", number, {kForward, kReverse, kJsd});
  return static_cast<Divergence>(number);
}

inline Divergence kl_of(int number) {
  check_choice("divergence", number, {kForward, kReverse});
  return static_cast<Divergence>(number);
}

// --- addresses -------------------------------------------------------------------------------------------------------

// The address of an array of `count` elements.
template <class T>
T* pointer(std::string_view name, Address address, int64_t count) {
  if (address == 0 && count != 0) refuse(name, "an address", "0");
  return reinterpret_cast<T*>(address);
}

template <class T>
T* optional_pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// `name` is an argument that a kernel needs where `other` is given.
inline void check_given_with(std::string_view name, bool given, std::string_view other, bool other_given) {
  if (other_given && !given) refuse(name, std::string("given with ").append(other), "none");
}

inline void check_given_together(std::string_view name, bool given, std::string_view other, bool other_given) {
  check_given_with(name, given, other, other_given);
  check_given_with(other, other_given, name, given);
}

}  // namespace softprompt
