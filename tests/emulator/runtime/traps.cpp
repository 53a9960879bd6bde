#include "traps.h"

#include <ucontext.h>

#include "machine.h"

namespace emu {

alignas(16) static char signal_stack[64 << 10];  // a fibre's own may be what overflowed

static void on_signal(int number, siginfo_t* info, void* context) {
  if (!running) {
    signal(number, SIG_DFL);  // not a kernel's: returns to the instruction, which then kills the process
    return;
  }
  const Site site = reinterpret_cast<Site>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
  if (number == SIGILL) fault(kTrap, "index past a local array, or shift by 32 or more, " + at(site));
  fault(kTrap, format("access through the wild pointer %p, or a stack that is too small, ", info->si_addr) + at(site));
}

TrapGuard::TrapGuard() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &stack_);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // NODEFER: the handler is left by a switch of stacks
  sigaction(SIGSEGV, &action, &segv_);
  sigaction(SIGILL, &action, &ill_);
}

TrapGuard::~TrapGuard() {
  sigaction(SIGSEGV, &segv_, nullptr);
  sigaction(SIGILL, &ill_, nullptr);
  sigaltstack(&stack_, nullptr);
}

}  // namespace emu
