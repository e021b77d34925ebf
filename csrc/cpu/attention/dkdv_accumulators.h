// Accumulators of dK and dV: fp32, private to a thread, and reduced in the order of the threads, so deterministic.
#pragma once

#include "cpu/attention/blocks.h"
#include "cpu/gemm/pack.h"

namespace softprompt::SPK_ISA {

// Writes the gradients of `count` keys of a range, from key `first` on. dK is multiplied by key_scale, which undoes the
// scale that packed queries have.
static void write_gradients(const AttentionProblem& problem, const KeyGradients& gradients, const KeyRange& keys,
                            int64_t first, int64_t count, const DkDvAccumulator& accumulator, float key_scale) {
  const int64_t size = round_up(problem.size, kLanes), value_size = round_up(problem.value_size, kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = keys.first + first + i;
    if (gradients.grad_key.data != nullptr) {
      write_row(problem.dtype, row_of(gradients.grad_key, problem.dtype, keys.batch, keys.head, token), problem.size,
                key_scale, accumulator.dk + i * size);
    }
    if (gradients.grad_value.data != nullptr) {
      write_row(problem.dtype, row_of(gradients.grad_value, problem.dtype, keys.batch, keys.head, token),
                problem.value_size, 1.0f, accumulator.dv + i * value_size);
    }
  }
}

// A thread's accumulators of the prompt keys or of the own keys, one key range after the other.
class ThreadAccumulators {
 public:
  ThreadAccumulators(const AttentionProblem& problem, const KeyGradients& gradients, int thread, float key_scale)
      : problem_(problem), gradients_(gradients), key_scale_(key_scale), size_(round_up(problem.size, kLanes)) {
    if (gradients.needed) buffers_ = gradients.buffers + 2 * thread * gradients.buffer_floats;
  }

  // The accumulator of a key range. If it is another range than before, completes that one and zeroes the accumulator.
  DkDvAccumulator begin_range(const KeyRange& keys, bool shared) {
    if (!gradients_.needed) return {};
    if (ranges_ == 0 || keys.batch != keys_.batch || keys.head != keys_.head || keys.first != keys_.first) {
      complete();
      ++ranges_;
      keys_ = keys;
      shared_ = shared;
      const int64_t floats = keys.count * (size_ + round_up(problem_.value_size, kLanes));
      for (int64_t i = 0; i < floats; i += kLanes) store(current() + i, Vec{});
    }
    return accumulator();
  }

  // Writes the gradients of the current range, unless other threads add to it too.
  void complete() {
    if (ranges_ > 0 && !shared_)
      write_gradients(problem_, gradients_, keys_, 0, keys_.count, accumulator(), key_scale_);
  }

 private:
  float* current() const { return buffers_ + (ranges_ > 1 ? gradients_.buffer_floats : 0); }
  DkDvAccumulator accumulator() const {
    return {gradients_.grad_key.data == nullptr ? nullptr : current(),
            gradients_.grad_value.data == nullptr ? nullptr : current() + keys_.count * size_, keys_.first};
  }

  const AttentionProblem& problem_;
  const KeyGradients& gradients_;
  float key_scale_;
  int64_t size_;
  float* buffers_ = nullptr;
  int64_t ranges_ = 0;
  KeyRange keys_ = {};
  bool shared_ = false;
};

// Reduces the partial sums of the shared ranges. Each thread sums and writes a part of the keys.
static void reduce_shared(const AttentionProblem& problem, const KeyGradients& gradients, int thread, float key_scale) {
  if (!gradients.needed) return;
  const int64_t size = round_up(problem.size, kLanes), value_size = round_up(problem.value_size, kLanes);
  for (int64_t r = 0; r < gradients.shared_count; ++r) {
    const SharedRange& range = gradients.shared[r];
    const int64_t first = range.keys.count * thread / problem.threads;
    const int64_t count = range.keys.count * (thread + 1) / problem.threads - first;
    // The sum is formed in the buffer of the first thread.
    float* total = gradients.buffers + (2 * range.first_thread + range.first_buffer) * gradients.buffer_floats;
    const int64_t value_offset = range.keys.count * size + first * value_size;
    const auto add = [&](int64_t begin, int64_t floats) {
      for (int64_t i = begin; i < begin + floats; i += kLanes) {
        Vec value = load(total + i);
        for (int64_t t = range.first_thread + 1; t <= range.last_thread; ++t) {
          value += load(gradients.buffers + 2 * t * gradients.buffer_floats + i);
        }
        store(total + i, value);
      }
    };
    add(first * size, count * size);
    add(value_offset, count * value_size);
    write_gradients(problem, gradients, range.keys, first, count, {total + first * size, total + value_offset, 0},
                    key_scale);
  }
}

}  // namespace softprompt::SPK_ISA
