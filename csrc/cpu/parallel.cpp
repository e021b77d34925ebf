// The module is compiled with OpenMP but not linked with a runtime of its own: its GOMP_* symbols are resolved in the
// process, where `import torch` has put those of the runtime that torch uses, whatever the name of that file is. Two
// runtimes would have two pools of threads that spin against each other.
#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace softprompt {
namespace {

// A pool of OpenMP threads does not survive a fork: the child waits forever for threads that exist in the parent only.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

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
  } else if (forked) {
    run_on_new_threads(threads, work, context);
  } else {
#pragma omp parallel num_threads(threads)
    for (int thread = omp_get_thread_num(); thread < threads; thread += omp_get_num_threads()) work(thread, context);
  }
}

}  // namespace softprompt
