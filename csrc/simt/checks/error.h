// The error that stops a launch: an operation whose behaviour CUDA does not define.
#pragma once

#include <cstdarg>
#include <stdexcept>
#include <string>

namespace softprompt::simt {

// Thrown by the launch, on the host's own stack, after one of its threads called `fail`.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch. Called from one of its threads. `place` is an address in the kernel's code, or null. The message is
// followed by the kernel, the block, the thread and, if there is debug information, the source line.
[[noreturn]] void fail(const void* place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// "file:line" of the instruction before `place`, from addr2line. The address itself if addr2line does not know it.
std::string describe_place(const void* place);

// The name of the function that begins at `code`, from addr2line too.
std::string describe_kernel(const void* code);

}  // namespace softprompt::simt
