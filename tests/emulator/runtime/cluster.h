// Clusters: thread blocks that start together, meet at barrier.cluster and reach into each other's shared memory.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

#include "clock.h"
#include "report.h"

namespace emu {

struct Block;
struct Thread;

struct Cluster {
  uint32_t serial = 0;  // never reused, so that shadow cells of earlier launches are told apart
  std::vector<Block*> blocks;  // by rank
  std::vector<std::string> actors;  // names. Those of all blocks, so that one clock orders what any of them does
  // barrier.cluster
  int live = 0;  // threads that have not exited
  int arrived = 0;
  uint32_t phase = 0;
  Clock arriving, completed;  // of this phase; of all before
  std::vector<Thread*> waiting;
};

// The thread is gone; barrier.cluster does not wait for it.
void leave_cluster(const Thread& thread);

// The block, which must not have ended, whose shared memory the address is of: an address of mapa.
Block& block_of(const Thread& thread, uint32_t address, Site site);
// The address below its rank. A fault unless the rank is the block's own, which is all that most instructions take.
uint32_t own_address(const Block& block, uint32_t address, Site site);

// `actor` reaches in its step `step` into the shared memory of `block`.
void reach_into(Block& block, int actor, uint32_t step);
// At the block's end: whoever reached into it is known to have done so.
void check_nobody_reaches_into(const Block& block);

}  // namespace emu
