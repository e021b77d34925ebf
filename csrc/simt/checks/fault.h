// What stops a launch: an access or a wait that no GPU would define.
#pragma once

#include <cstdarg>
#include <stdexcept>
#include <string>

namespace softprompt::simt {

// Thrown by the launch, on the host's own stack, after one of its threads has failed.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch from within a thread of it. `place` is an address in the kernel's code, null if there is none; the
// message is followed by kernel, block, thread and, where debug information is there, the source line.
[[noreturn]] void fail(const void* place, const char* format, ...) __attribute__((format(printf, 2, 3)));

// "file:line" that an instruction before `place` comes from, as far as addr2line can tell; else the address.
std::string describe_place(const void* place);

// The name of the function that begins at `code`, likewise.
std::string describe_kernel(const void* code);

}  // namespace softprompt::simt
