#include "fibre.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace emu {

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

asm(R"(
.text
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack,.-emu_switch_stack
)");
extern "C" void emu_switch_stack(void** save, void* to) __attribute__((visibility("hidden")));

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4 << 10;
constexpr int kStacks = 16 << 10;
// NaN where a thread's first frames will be: what a kernel leaves uninitialised shows. Deeper frames are rare.
constexpr size_t kFilledBytes = 16 << 10;
constexpr int kFill = 0xff;

// Untouched pages of the pool cost address space only.
static char* stack_pool() {
  static char* pool = [] {
    const size_t bytes = kStacks * (kStackBytes + kGuardBytes);
    void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      perror("emulator: no memory for stacks");
      abort();
    }
    return static_cast<char*>(memory);
  }();
  return pool;
}

void start_fibre(Fibre& fibre, int index, void (*body)()) {
  static int usable = 0;  // stacks below have been given their pages
  char* const pool = stack_pool();
  if (index >= kStacks) abort();
  for (; usable <= index; ++usable) {
    mprotect(pool + usable * (kStackBytes + kGuardBytes) + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE);
  }
  char* const stack = pool + index * (kStackBytes + kGuardBytes) + kGuardBytes;
  memset(stack + kStackBytes - kFilledBytes, kFill, kFilledBytes);
  // Staggered tops: equal ones would put the same local variable of every thread into one cache set.
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64 - index % 32 * 64);
  *--top = nullptr;                           // alignment: a function starts 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(body);     // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six registers
  fibre.stack_pointer = top;
}

void switch_fibre(Fibre& from, Fibre& to) { emu_switch_stack(&from.stack_pointer, to.stack_pointer); }

}  // namespace emu
