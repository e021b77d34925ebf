// The module is compiled with OpenMP but not linked with an OpenMP runtime. Its GOMP_* symbols are resolved in the
// process: `import torch` has loaded torch's runtime, under whatever file name. With two runtimes there would be two
// thread pools whose waiting threads take each other's cores. Clang uses other symbols, which torch's runtime may lack.
// So Clang compiles the module without OpenMP: each call starts its own threads, at about ten microseconds each.
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
// An OpenMP thread pool does not survive a fork: the child would wait forever for threads that only the parent has.
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
  } catch (const std::system_error&) {  // the system gives no more threads: the calling thread does the rest
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
