#include "simt/checks/error.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>

namespace softprompt::simt {
namespace {

struct Line {
  std::string function, place;
};

// Asks addr2line. If functions were inlined at the address, returns the innermost one that is not in csrc/simt.
Line look_up(const void* address) {
  Dl_info module;
  if (dladdr(address, &module) == 0) return {};
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(module.dli_fbase);
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -C -f -i -e '%s' %#tx 2>/dev/null", module.dli_fname, offset);
  const std::unique_ptr<FILE, int (*)(FILE*)> output(popen(command, "r"), pclose);
  if (!output) return {};
  for (;;) {
    Line line;
    for (std::string* part : {&line.function, &line.place}) {
      char text[2048];
      if (std::fgets(text, sizeof text, output.get()) == nullptr) return {};
      *part = text;
      part->resize(part->find_last_not_of("\n") + 1);
    }
    if (line.place.empty() || line.place[0] == '?') return {};
    const size_t note = line.place.find(" (discriminator");
    if (note != std::string::npos) line.place.resize(note);
    if (line.place.find("/csrc/simt/") == std::string::npos) return line;
  }
}

std::string hex(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

}  // namespace

std::string describe_place(const void* place) {
  const Line found = look_up(static_cast<const char*>(place) - 1);  // a return address can belong to the next line
  return found.place.empty() ? hex(place) : found.place;
}

std::string describe_kernel(const void* code) {
  const Line found = look_up(code);
  return found.function.empty() ? "the kernel at " + hex(code) : found.function;
}

}  // namespace softprompt::simt
