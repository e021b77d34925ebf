// Work on several threads at once, on the OpenMP pool that PyTorch runs on.
#pragma once

namespace softprompt {

// Calls work(thread, context) once for each thread in [0, threads), at most `threads` of them at the same time.
// The caller says how many (torch.get_num_threads()), and the split of the work depends on that number alone, so results
// do not depend on how many threads the runtime really gives, nor on whether this runs in a forked process.
void run_on_threads(int threads, void (*work)(int thread, void* context), void* context);

template <class Work>
void parallel(int threads, Work&& work) {
  run_on_threads(threads, [](int thread, void* context) { (*static_cast<Work*>(context))(thread); }, &work);
}

}  // namespace softprompt
