#include "simt/runtime/device.h"

#include "simt/checks/counters.h"
#include "simt/checks/memory.h"
#include "simt/runtime/grid.h"

namespace softprompt::simt {
namespace {

template <class T>
T add(T* address, T value, const void* place) {
  check_access(address, sizeof(T), Access::atomic, place);
  count_atomic();
  const T before = *address;
  *address = before + value;
  return before;
}

}  // namespace

uint3 thread_index() { return thread().index; }
uint3 block_index() { return block().index; }
dim3 block_size() { return current_launch().block; }
dim3 grid_size() { return current_launch().grid; }

void sync_threads() { wait_for_block(__builtin_return_address(0)); }

float atomic_add(float* address, float value) { return add(address, value, __builtin_return_address(0)); }
int atomic_add(int* address, int value) { return add(address, value, __builtin_return_address(0)); }

}  // namespace softprompt::simt
