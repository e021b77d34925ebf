// Finds which of the compiled instruction sets this machine has, and chooses one.
#include "cpu/platform/instruction_set.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef SPK_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace softprompt {

#ifdef SPK_HAS_AMX
namespace amx {
extern const Kernels table;
}
#endif
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

#if defined(SPK_HAS_AMX) || defined(SPK_HAS_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef SPK_HAS_AMX
// Asks Linux for the AMX tile registers and says whether the process may use them. They are 8 KiB of state for each
// thread that uses them, so a process has to ask for them, once for all its threads. Linux refuses if it is older than
// 5.16, if a virtual machine hides them, or if the signal stack of a thread is too small to hold them.
bool may_use_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBf16) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool supported;  // the machine has this instruction set
};

struct Candidates {
  Candidate sets[4];
  int count = 0;
  const char* usable[4];
  int usable_count = 0;

  Candidates() {
#ifdef SPK_HAS_AMX
    add(amx::table, has_avx512() && may_use_amx());
#endif
#ifdef SPK_HAS_AVX512
    add(avx512::table, has_avx512());
#endif
#ifdef SPK_HAS_AVX2
    add(avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
    add(baseline::table, true);
  }

  void add(const Kernels& kernels, bool supported) {
    sets[count++] = {&kernels, supported};
    if (supported) usable[usable_count++] = kernels.name;
  }
};

const Candidates& candidates() {
  static const Candidates found;
  return found;
}

const Kernels& choose() {
  const Candidates& found = candidates();
  const char* named = std::getenv("SOFTPROMPT_ISA");
  std::string accepted;
  for (int i = 0; i < found.count; ++i) {
    const Candidate& candidate = found.sets[i];
    if (!candidate.supported) continue;
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
