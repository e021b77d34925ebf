// Tensors as the attention's bindings are given them: address, sizes and strides, checked before any pointer is followed.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace softprompt {

using Shape = std::array<int64_t, 4>;
using View = std::tuple<uintptr_t, Shape, Shape>;  // address, sizes and strides in elements of a tensor
using Vector = std::tuple<uintptr_t, int64_t>;     // address and length of one without gaps

inline std::string text(const Shape& shape) {
  std::string words = "[";
  for (size_t i = 0; i < shape.size(); ++i) words += (i ? ", " : "") + std::to_string(shape[i]);
  return words + "]";
}

// A tensor [batch, head, token, size] as a `Tensor`, which begins with a pointer and three strides.
template <class Tensor>
Tensor strided(const char* name, const View& view, const Shape& expected) {
  const auto& [address, sizes, strides] = view;
  if (sizes != expected) {
    throw std::invalid_argument(std::string(name) + " must have shape " + text(expected) + "; got " + text(sizes));
  }
  if (sizes[3] > 1 && strides[3] != 1) {
    throw std::invalid_argument(std::string(name) + " must have a last stride of 1; got strides " + text(strides));
  }
  return {reinterpret_cast<decltype(Tensor::data)>(address), strides[0], strides[1], strides[2]};
}

template <class Tensor>
Tensor token_major(const char* name, const View& view, const Shape& expected) {
  const Tensor tensor = strided<Tensor>(name, view, expected);
  const auto [batch, heads, tokens, size] = expected;
  const bool dense = tensor.head == size && tensor.token == heads * size &&
                     (batch <= 1 || tensor.batch == tokens * heads * size);
  if (!dense && batch * heads * tokens * size > 0) {
    throw std::invalid_argument(std::string(name) + " must lie in memory as [batch, token, head, size]; got strides " +
                                text(std::get<2>(view)));
  }
  return tensor;
}

template <class T>
T* vector(const char* name, const Vector& given, int64_t length) {
  if (std::get<1>(given) != length) {
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(length) + " elements; got " +
                                std::to_string(std::get<1>(given)));
  }
  return reinterpret_cast<T*>(std::get<0>(given));
}

template <class T>
T* optional_vector(const char* name, const std::optional<Vector>& given, int64_t length) {
  return given ? vector<T>(name, *given, length) : nullptr;
}

inline void positive(const char* name, int64_t value) {
  if (value < 1) throw std::invalid_argument(std::string(name) + " must be at least 1; got " + std::to_string(value));
}

}  // namespace softprompt
