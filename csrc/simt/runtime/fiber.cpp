// Switches stacks in assembly: pushes the registers that a callee must preserve, exchanges the stack pointers, and pops
// the registers of the other stack. The C library's swapcontext would also save the signal mask, which is a system call
// at each of a kernel's many waits.
#include "simt/runtime/fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void softprompt_simt_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl softprompt_simt_switch
.hidden softprompt_simt_switch
.type softprompt_simt_switch, @function
softprompt_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size softprompt_simt_switch, .-softprompt_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl softprompt_simt_switch
.hidden softprompt_simt_switch
.type softprompt_simt_switch, %function
softprompt_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size softprompt_simt_switch, .-softprompt_simt_switch
)");
#else
#error "csrc/simt runs on x86-64 and on 64-bit Arm"
#endif

namespace softprompt::simt {
namespace {

void* host_stack_pointer;
bool inside = false;

// AddressSanitizer keeps a shadow of each stack and must be told which one is in use.
#if defined(__SANITIZE_ADDRESS__)
void* host_shadow;
const void* host_stack;
size_t host_stack_bytes;
void announce(void** keep, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(keep, stack, bytes); }
void acknowledge(void* kept, const void** stack, size_t* bytes) { __sanitizer_finish_switch_fiber(kept, stack, bytes); }
#endif

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // a fiber that failed has left frames there
#endif
  char* top = fiber.stack + kStackBytes;
#if defined(__x86_64__)
  auto** slot = reinterpret_cast<void**>(top - 8);  // as after a call, the stack pointer is 8 below a multiple of 16
  *--slot = reinterpret_cast<void*>(entry);
  slot -= 6;
  std::memset(slot, 0, 6 * sizeof(void*));
  fiber.stack_pointer = slot;
#else
  auto** slot = reinterpret_cast<void**>(top - 160);
  std::memset(slot, 0, 160);
  slot[11] = reinterpret_cast<void*>(entry);  // x30
  fiber.stack_pointer = slot;
#endif
  fiber.shadow = nullptr;
}

void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  announce(&host_shadow, fiber.stack, kStackBytes);
#endif
  inside = true;
  softprompt_simt_switch(&host_stack_pointer, fiber.stack_pointer);
  inside = false;
#if defined(__SANITIZE_ADDRESS__)
  acknowledge(host_shadow, nullptr, nullptr);
#endif
}

void leave(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  announce(for_good ? nullptr : &fiber.shadow, host_stack, host_stack_bytes);
#endif
  (void)for_good;
  softprompt_simt_switch(&fiber.stack_pointer, host_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  acknowledge(fiber.shadow, &host_stack, &host_stack_bytes);
#endif
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  acknowledge(nullptr, &host_stack, &host_stack_bytes);
#endif
}

bool in_fiber() { return inside; }

char* stack_of(size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    const size_t bytes = kGuardBytes + kReserveBytes + kStackBytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory) + kGuardBytes + kReserveBytes);
  }
  return stacks[index];
}

}  // namespace softprompt::simt
