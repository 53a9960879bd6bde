// Named barriers (bar.sync, bar.arrive); __syncthreads is number 0 with every thread of the block.
#include "machine.h"
#include "scheduler.h"

namespace emu {

static std::string missing_threads(const Block& block, uint32_t id) {
  const NamedBarrier& barrier = block.barriers[id];
  return format("barrier %u: %u of %u threads have arrived", id, barrier.arrived, barrier.expected);
}

static void arrive(unsigned id, unsigned threads, bool wait, const char* what, Site site) {
  Thread& thread = *current();
  if (id >= kNamedBarriers) fault(kBarrier, format("%s %s: there is no barrier %u", what, at(site).c_str(), id));
  NamedBarrier& barrier = thread.block->barriers[id];
  if (barrier.arrived && barrier.expected != threads) {
    fault(kBarrier, format("%s %s with %u threads, while barrier %u is open for %u", what, at(site).c_str(), threads,
                           id, barrier.expected));
  }
  if (threads == 0 || threads % kWarpLanes) {
    fault(kBarrier, format("%s %s with %u threads: no multiple of the warp size", what, at(site).c_str(), threads));
  }
  barrier.expected = threads;
  ++barrier.arrived;
  if (options.check_races) release(thread, barrier.clock);
  if (barrier.arrived < threads) {
    if (!wait) return;
    barrier.waiting.push_back(&thread);
    park({what, site, missing_threads, id});
    return;
  }
  const Clock together = std::move(barrier.clock);
  barrier.clock = {};
  barrier.arrived = 0;
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  if (wait) waiting.push_back(&thread);
  for (Thread* waiter : waiting) {
    waiter->clock.join(together);
    flush_banks(warp_of(*waiter).bank_requests);
    if (waiter != &thread) make_ready(*waiter);
  }
}

void sync_threads() {
  const Dim3& dim = running->view->block_dim;
  arrive(0, dim.x * dim.y * dim.z, true, "__syncthreads", __builtin_return_address(0));
}

void barrier_sync(unsigned id, unsigned threads) {
  arrive(id, threads, true, "bar.sync", __builtin_return_address(0));
}

void barrier_arrive(unsigned id, unsigned threads) {
  arrive(id, threads, false, "bar.arrive", __builtin_return_address(0));
}

}  // namespace emu
