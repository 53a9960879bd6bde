#include "cluster.h"

#include "machine.h"
#include "scheduler.h"

namespace emu {

// ---- addresses

static constexpr uint32_t kInBlock = (1u << kRankShift) - 1;

uint32_t own_address(const Block& block, uint32_t address, Site site) {
  if (address >> kRankShift != block.rank) {
    fault(kBounds, format("shared-memory address %#x is of block %u of the cluster, not of %s, which is block %u, %s",
                          address, address >> kRankShift, name_of(block).c_str(), block.rank, at(site).c_str()));
  }
  return address & kInBlock;
}

Block& block_of(const Thread& thread, uint32_t address, Site site) {
  const std::vector<Block*>& blocks = thread.block->cluster->blocks;
  const uint32_t rank = address >> kRankShift;
  if (rank >= blocks.size()) {
    fault(kBounds, format("shared-memory address %#x is of block %u of a cluster of %zu, %s", address, rank,
                          blocks.size(), at(site).c_str()));
  }
  if (blocks[rank]->ended) {
    fault(kInFlight, "the shared memory of " + name_of(*blocks[rank]) + " is reached into after its end, " + at(site));
  }
  return *blocks[rank];
}

uint32_t map_shared(uint32_t address, uint32_t rank) {
  const size_t blocks = current()->block->cluster->blocks.size();
  if (rank >= blocks) {
    fault(kBounds, format("mapa to block %u of a cluster of %zu, %s", rank, blocks,
                          at(__builtin_return_address(0)).c_str()));
  }
  return (address & kInBlock) | rank << kRankShift;
}

uint32_t cluster_rank() { return current()->block->rank; }

// ---- barrier.cluster

static void complete_if_all_arrived(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
  ++cluster.phase;
  cluster.arrived = 0;
  cluster.completed.join(cluster.arriving);
  cluster.arriving = {};
  std::vector<Thread*> waiting;
  waiting.swap(cluster.waiting);
  for (Thread* thread : waiting) make_ready(*thread);
}

void leave_cluster(const Thread& thread) {
  --thread.block->cluster->live;
  complete_if_all_arrived(*thread.block->cluster);
}

void cluster_arrive_relaxed() {
  Thread& thread = *current();
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrivals > cluster.phase) {
    fault(kBarrier, "barrier.cluster.arrive for the second time without a wait, " + at(__builtin_return_address(0)));
  }
  thread.cluster_arrivals = cluster.phase + 1;
  ++cluster.arrived;
  if (options.check_races) cluster.arriving.join(thread.fenced_initialisations);
  complete_if_all_arrived(cluster);
}

static std::string missing_threads(const Block& block, uint32_t) {
  return format("%d of %d threads have arrived", block.cluster->arrived, block.cluster->live);
}

void cluster_wait() {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrivals == 0) fault(kBarrier, "barrier.cluster.wait without an arrival, " + at(site));
  while (cluster.phase < thread.cluster_arrivals) {
    cluster.waiting.push_back(&thread);
    park({"barrier.cluster.wait", site, missing_threads});
  }
  thread.clock.join(cluster.completed);
}

// ---- the end of a block

void reach_into(Block& block, int actor, uint32_t step) { block.reached_into.raise(actor, step); }

void check_nobody_reaches_into(const Block& block) {
  if (!options.check_races) return;
  const std::vector<std::string>& actors = block.cluster->actors;
  for (size_t actor = 0; actor < actors.size(); ++actor) {
    if (block.reached_into[actor] > block.at_exit.seen[actor]) {
      finding(kInFlight, name_of(block) + " ends without knowing that nobody reaches into its shared memory any more: " +
                             actors[actor]);
      return;
    }
  }
}

}  // namespace emu
