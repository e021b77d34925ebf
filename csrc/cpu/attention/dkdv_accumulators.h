// Sums of dK and dV over the rows that see the keys: in fp32, private to a thread, added up in the order of the threads.
#pragma once

#include "cpu/attention/blocks.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

// Writes `count` keys from the `first` of a range on, from their sums. Packed queries carry their scale into dK.
static void write_sum(const AttentionProblem& problem, const KeySums& sums, const KeyRange& keys, int64_t first,
                      int64_t count, const KeySum& sum, float key_scale) {
  const int64_t size = round_up(problem.size, kLanes), value_size = round_up(problem.value_size, kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = keys.first + first + i;
    if (sums.grad_key.data != nullptr) {
      write_row(problem.dtype, row_of(sums.grad_key, problem.dtype, keys.batch, keys.head, token), problem.size,
                key_scale, sum.key + i * size);
    }
    if (sums.grad_value.data != nullptr) {
      write_row(problem.dtype, row_of(sums.grad_value, problem.dtype, keys.batch, keys.head, token),
                problem.value_size, 1.0f, sum.value + i * value_size);
    }
  }
}

// A thread's sums of one kind of keys.
class ThreadSums {
 public:
  ThreadSums(const AttentionProblem& problem, const KeySums& sums, int thread, float key_scale)
      : problem_(problem), sums_(sums), key_scale_(key_scale), size_(round_up(problem.size, kLanes)) {
    if (sums.needed) buffers_ = sums.buffers + 2 * thread * sums.buffer_floats;
  }

  // Where to add to the gradients of some keys; ends the range before.
  KeySum of(const KeyRange& keys, bool shared) {
    if (!sums_.needed) return {};
    if (ranges_ == 0 || keys.batch != keys_.batch || keys.head != keys_.head || keys.first != keys_.first) {
      complete();
      ++ranges_;
      keys_ = keys;
      shared_ = shared;
      const int64_t floats = keys.count * (size_ + round_up(problem_.value_size, kLanes));
      for (int64_t i = 0; i < floats; i += kLanes) store(current() + i, Vec{});
    }
    return sum();
  }

  // Writes the gradients of the last range, unless other threads have a part of them.
  void complete() {
    if (ranges_ > 0 && !shared_) write_sum(problem_, sums_, keys_, 0, keys_.count, sum(), key_scale_);
  }

 private:
  float* current() const { return buffers_ + (ranges_ > 1 ? sums_.buffer_floats : 0); }
  KeySum sum() const {
    return {sums_.grad_key.data == nullptr ? nullptr : current(),
            sums_.grad_value.data == nullptr ? nullptr : current() + keys_.count * size_, keys_.first};
  }

  const AttentionProblem& problem_;
  const KeySums& sums_;
  float key_scale_;
  int64_t size_;
  float* buffers_ = nullptr;
  int64_t ranges_ = 0;
  KeyRange keys_ = {};
  bool shared_ = false;
};

// What several threads have parts of: each thread adds up and writes a slice of its keys.
static void fold_shared(const AttentionProblem& problem, const KeySums& sums, int thread, float key_scale) {
  if (!sums.needed) return;
  const int64_t size = round_up(problem.size, kLanes), value_size = round_up(problem.value_size, kLanes);
  for (int64_t r = 0; r < sums.shared_count; ++r) {
    const SharedRange& range = sums.shared[r];
    const int64_t first = range.keys.count * thread / problem.threads;
    const int64_t count = range.keys.count * (thread + 1) / problem.threads - first;
    float* total = sums.buffers + (2 * range.first_thread + range.first_buffer) * sums.buffer_floats;  // adds up here
    const int64_t value_offset = range.keys.count * size + first * value_size;
    const auto add = [&](int64_t begin, int64_t floats) {
      for (int64_t i = begin; i < begin + floats; i += kLanes) {
        Vec value = load(total + i);
        for (int64_t t = range.first_thread + 1; t <= range.last_thread; ++t) {
          value += load(sums.buffers + 2 * t * sums.buffer_floats + i);
        }
        store(total + i, value);
      }
    };
    add(first * size, count * size);
    add(value_offset, count * value_size);
    write_sum(problem, sums, range.keys, first, count, {total + first * size, total + value_offset, 0}, key_scale);
  }
}

}  // namespace softprompt::SPK_ISA
