// cp.async: a copy reads its source at any time up to the wait for its group and writes its target at any time after
// its issue. Here the target is NaN from the issue on and the data arrives at the wait: whoever does not wait sees it.
#pragma once
#include <stdint.h>

#include <vector>

#include "report.h"

namespace emu {

struct Thread;

struct Copy {
  unsigned char* target;
  const unsigned char* source;
  int bytes, source_bytes;  // the rest is zeros
  uint32_t group;
  Site site;
};

struct CopyQueue {
  std::vector<Copy> pending;
  uint32_t groups = 0;  // committed so far
  int actor = -1;       // of this thread's copies; steps are groups
};

void check_no_copies_pending(const Thread& thread);

}  // namespace emu
