// Runs work on several threads at once, in PyTorch's OpenMP thread pool.
#pragma once

namespace softprompt {

// Calls work(thread, context) once for each thread in [0, threads), at most `threads` of them at the same time. The
// caller chooses `threads` (torch.get_num_threads()). The division of the work depends on that number alone, so the
// results depend neither on how many threads the runtime really starts nor on whether the process was forked.
void run_on_threads(int threads, void (*work)(int thread, void* context), void* context);

template <class Work>
void parallel(int threads, Work&& work) {
  run_on_threads(threads, [](int thread, void* context) { (*static_cast<Work*>(context))(thread); }, &work);
}

}  // namespace softprompt
