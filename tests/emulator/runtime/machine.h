// The emulated machine's state: blocks of threads, their warps, barriers and clocks.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "banks.h"
#include "clock.h"
#include "cluster.h"
#include "collective.h"
#include "cp_async.h"
#include "fibre.h"
#include "kernel_api.h"
#include "mbarrier.h"
#include "report.h"
#include "shadow.h"
#include "tma.h"
#include "wgmma.h"

namespace emu {

constexpr int kWarpLanes = 32;
constexpr int kNamedBarriers = 16;
constexpr uint32_t kSharedBase = 1024;  // 32-bit address of the first byte of shared memory: null is no address
constexpr int kRankShift = 24;  // above it, a shared-memory address has the block's number in its cluster

struct Block;

struct Wait {
  const char* what = nullptr;
  Site site = nullptr;
  std::string (*explain)(const Block&, uint32_t id) = nullptr;  // what is missing, for the deadlock report
  uint32_t id = 0;
};

enum class State { kReady, kWaiting, kPolling, kExited };

struct Thread : ThreadView {
  Block* block = nullptr;
  int id = 0, lane = 0, warp = 0;
  int actor = 0;
  uint32_t cluster_arrivals = 0;
  State state = State::kReady;
  Wait wait;
  Fibre fibre;
  Clock clock;
  Clock fenced;  // what it knew at its last __threadfence
  Clock fenced_initialisations;  // the same of fence.mbarrier_init; all else it knew then passes too, which is generous
  CopyQueue copies;
  StoreQueue stores;
  BankCounters bank_counters;
};

struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  Clock clock;
};

struct Warp {
  uint32_t lanes = 0;  // those that exist
  std::array<Rendezvous, 4> meetings;
  BankRequests bank_requests;
  ProductQueue products;
};

struct Block : BlockView {
  std::shared_ptr<Cluster> cluster;  // of the block by itself if the kernel has none
  uint32_t rank = 0;                 // in the cluster
  bool ended = false;  // all threads have exited; it stays until the cluster's other blocks end too
  size_t shared_bytes = 0;
  int live = 0;  // threads that have not exited
  int slot = 0;  // of the resident blocks
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::array<NamedBarrier, kNamedBarriers> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  SharedShadow shadow;
  Steps reached_into;  // by other blocks of the cluster: what must be over when this one ends
  Clock at_exit;       // what its threads knew
};

inline Thread* current() { return static_cast<Thread*>(running); }
inline Warp& warp_of(Thread& thread) { return thread.block->warps[thread.warp]; }

std::string name_of(const Block& block);
std::string name_of(const Thread& thread);

// A thread, and an engine that works behind threads, gets a number among the cluster's actors.
inline int new_actor(Block& block, std::string name) {
  Cluster& cluster = *block.cluster;
  if (cluster.blocks.size() > 1) name += " of " + name_of(block);
  cluster.actors.push_back(std::move(name));
  return static_cast<int>(cluster.actors.size()) - 1;
}

// A thread's clock flows into whatever the next thread will learn it from; its later steps are new ones.
inline void release(Thread& thread, Clock& into) {
  into.join(thread.clock);
  thread.clock.seen.raise(thread.actor, thread.clock.seen[thread.actor] + 1);
}

struct Options {
  uint64_t seed = 0;
  int resident_blocks = 3;
  int check_races = 1;
  int count_banks = 1;
  int cluster_blocks = 1;
};
extern Options options;

}  // namespace emu
