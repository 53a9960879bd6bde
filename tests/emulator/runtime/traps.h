// Signals of a kernel's thread as findings: a wild pointer, or a trap that -fsanitize=bounds,shift compiled in (an
// index past a register array, a shift by 32 or more).
#pragma once
#include <signal.h>

namespace emu {

class TrapGuard {  // while it lives
 public:
  TrapGuard();
  ~TrapGuard();

 private:
  struct sigaction segv_, ill_;
  stack_t stack_;
};

}  // namespace emu
