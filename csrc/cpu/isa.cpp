#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace softprompt {

#ifdef SPK_HAS_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef SPK_HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
namespace baseline {
extern const Kernels table;
}

namespace {

struct Candidate {
  const Kernels* kernels;
  bool here;  // the machine has it
};

struct Candidates {
  Candidate sets[3];
  int count = 0;
  const char* usable[3];
  int usable_count = 0;

  Candidates() {
#ifdef SPK_HAS_AVX512
    add(avx512::table, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#endif
#ifdef SPK_HAS_AVX2
    add(avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
    add(baseline::table, true);
  }

  void add(const Kernels& kernels, bool here) {
    sets[count++] = {&kernels, here};
    if (here) usable[usable_count++] = kernels.name;
  }
};

const Candidates& candidates() {
  static const Candidates found;
  return found;
}

}  // namespace

namespace {

const Kernels& choose() {
  const Candidates& found = candidates();
  const char* named = std::getenv("SOFTPROMPT_ISA");
  std::string accepted;
  for (int i = 0; i < found.count; ++i) {
    const Candidate& candidate = found.sets[i];
    if (!candidate.here) continue;
    if (named == nullptr || *named == '\0' || std::strcmp(named, candidate.kernels->name) == 0) {
      return *candidate.kernels;
    }
    accepted += accepted.empty() ? "" : ", ";
    accepted += candidate.kernels->name;
  }
  throw std::invalid_argument("SOFTPROMPT_ISA must be one of " + accepted + " on this machine; got '" + named + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* const* usable_instruction_sets(int& count) {
  count = candidates().usable_count;
  return candidates().usable;
}

}  // namespace softprompt
