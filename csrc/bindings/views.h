// Tensors as Python gives them to the attention's bindings: address, sizes and strides, and the checks of these.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "bindings/checks.h"

namespace softprompt {

using Shape = std::array<int64_t, 4>;
using View = std::tuple<Address, Shape, Shape>;  // address, sizes and strides of a tensor; strides in elements
using Vector = std::tuple<Address, int64_t>;     // address and length of a dense array

inline std::string text(const Shape& shape) {
  std::string list = "[";
  for (size_t i = 0; i < shape.size(); ++i) list += (i ? ", " : "") + std::to_string(shape[i]);
  return list + "]";
}

inline bool is_empty(const Shape& shape) {
  for (const int64_t size : shape) {
    if (size == 0) return true;
  }
  return false;
}

// A tensor [batch, head, token, size]. The struct `Tensor` begins with a pointer and the strides of the first three.
template <class Tensor>
Tensor strided(std::string_view name, const View& view, const Shape& expected) {
  const auto& [address, sizes, strides] = view;
  if (sizes != expected) refuse(std::string(name) + "'s shape", text(expected), text(sizes));
  if (sizes[3] > 1 && strides[3] != 1) refuse(std::string(name) + "'s last stride", "1", "strides " + text(strides));
  using Data = std::remove_pointer_t<decltype(Tensor::data)>;
  return {pointer<Data>(name, address, is_empty(sizes) ? 0 : 1), strides[0], strides[1], strides[2]};
}

// The same, of which memory holds [batch, token, head, size] without gaps.
template <class Tensor>
Tensor token_major(std::string_view name, const View& view, const Shape& expected) {
  const Tensor tensor = strided<Tensor>(name, view, expected);
  const auto [batch, heads, tokens, size] = expected;
  const bool dense = tensor.head == size && tensor.token == heads * size &&
                     (batch <= 1 || tensor.batch == tokens * heads * size);
  if (!dense && !is_empty(expected)) {
    refuse(name, "dense in memory as [batch, token, head, size]", "strides " + text(std::get<2>(view)));
  }
  return tensor;
}

template <class T>
T* vector(std::string_view name, const Vector& given, int64_t length) {
  const auto& [address, elements] = given;
  if (elements != length) {
    refuse(std::string(name) + "'s length", std::to_string(length), std::to_string(elements));
  }
  return pointer<T>(name, address, length);
}

template <class T>
T* optional_vector(std::string_view name, const std::optional<Vector>& given, int64_t length) {
  return given ? vector<T>(name, *given, length) : nullptr;
}

// --- what the CPU's and the GPU's attention check alike --------------------------------------------------------------

// Query heads per key head.
inline int64_t group_of(int64_t heads, int64_t kv_heads) {
  check_at_least("key's heads", kv_heads, 1);
  if (heads % kv_heads != 0) {
    refuse("query's heads", "a multiple of key's heads, " + std::to_string(kv_heads), std::to_string(heads));
  }
  return heads / kv_heads;
}

// Without `prompt_index`, all sequences share one prompt or each has its own.
inline void check_prompts(bool indexed, int64_t prompts, int64_t sequences) {
  if (sequences == 0) return;
  check_at_least("prompt_key's prompts", prompts, 1);
  if (indexed || prompts == 1 || prompts == sequences) return;
  const std::string counts = std::to_string(prompts) + " prompts and " + std::to_string(sequences) + " sequences";
  refuse("prompt_index", "given for " + counts, "None");
}

}  // namespace softprompt
