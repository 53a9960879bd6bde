// TMA: boxes of tensors travel behind the threads, in pieces, at random times. A load's bytes land any time up to the
// completion of its mbarrier's phase; a store reads shared memory any time up to the wait for its group.
#pragma once
#include <stdint.h>

#include <vector>

#include "clock.h"
#include "report.h"

namespace emu {

struct Block;
struct Thread;

struct StoreQueue {
  uint32_t groups = 0;                  // committed so far
  uint32_t issued = 0;                  // stores, in all groups
  std::vector<uint32_t> group_ends;     // stores issued when each group was committed
  int reader = -1, writer = -1;         // actors: what a store reads and what it writes are waited for apart
  uint32_t read_waited = 0;             // stores whose shared memory is known to have been read
};

bool step_transfers();  // moves a random piece; false if there is nothing to move
void check_no_stores_pending(const Thread& thread);
void end_transfers(const Block& block);  // at the block's end
void cancel_transfers();

}  // namespace emu
