// mbarrier: a phase completes when all arrivals are in and all expected bytes have landed.
#pragma once
#include <stdint.h>

#include <vector>

#include "clock.h"
#include "report.h"

namespace emu {

struct Block;
struct Thread;

struct Mbarrier {
  uint32_t address = 0;
  int arrivals = 0, pending = 0;  // per phase; still missing in this one
  int64_t bytes = 0;              // expected and not landed
  uint32_t phase = 0;
  int actor = -1;            // of the TMA loads that report here; steps are loads
  uint32_t loads = 0;
  Thread* initialiser = nullptr;
  uint32_t initialised_at = 0;    // its step
  uint32_t fenced_at = 0;         // and that of its fence, 0 for none: whoever knows of it may tell TMA
  std::vector<Thread*> waiting;
  Clock arriving, completed;  // of this phase; of all before
};

// The mbarrier at `address`, which the running thread may use.
Mbarrier& mbarrier_at(Block& block, uint32_t address, Site site);

// Bytes of a load that was issued in `phase` have landed.
void land_bytes(Mbarrier& mbarrier, uint32_t phase, int64_t bytes, Site load);

void complete_if_done(Mbarrier& mbarrier);

}  // namespace emu
