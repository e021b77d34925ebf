// The module is compiled with OpenMP but not linked with a runtime of its own: its GOMP_* symbols are resolved in the
// process, where `import torch` has put those of the runtime that torch uses, whatever the name of that file is. Two
// runtimes would have two pools of threads that spin against each other. Clang asks for other symbols, which that runtime
// need not have: built by it, every call starts threads of its own, which costs some ten microseconds each.
#include "cpu/platform/parallel.h"

#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace softprompt {
namespace {

#ifdef _OPENMP
// A pool of OpenMP threads does not survive a fork: the child waits forever for threads that exist in the parent only.
std::atomic<bool> no_pool{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { no_pool = true; });
#else
constexpr bool no_pool = true;
#endif

void run_on_new_threads(int threads, void (*work)(int, void*), void* context) {
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  int started = 1;
  try {
    for (; started < threads; ++started) others.emplace_back(work, started, context);
  } catch (const std::system_error&) {  // the system gives no more threads: the caller's does the rest
  }
  for (int thread = started; thread < threads; ++thread) work(thread, context);
  work(0, context);
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_on_threads(int threads, void (*work)(int thread, void* context), void* context) {
  if (threads == 1) {
    work(0, context);
  } else if (no_pool) {
    run_on_new_threads(threads, work, context);
  } else {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    for (int thread = omp_get_thread_num(); thread < threads; thread += omp_get_num_threads()) work(thread, context);
#endif
  }
}

}  // namespace softprompt
