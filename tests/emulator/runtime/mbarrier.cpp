#include "mbarrier.h"

#include "machine.h"
#include "memory.h"
#include "scheduler.h"

namespace emu {

constexpr uint32_t kMbarrierBytes = 8;

static std::string name_of(const Mbarrier& mbarrier) {
  return format("mbarrier at shared memory +%u", mbarrier.address - kSharedBase);
}

Mbarrier& mbarrier_at(Block& block, uint32_t address, Site site) {
  require_shared(block, address, kMbarrierBytes, kMbarrierBytes, true, site);
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) {
    fault(kBarrier, format("shared memory +%u is not an initialised mbarrier, %s", address - kSharedBase,
                           at(site).c_str()));
  }
  Mbarrier& mbarrier = found->second;
  const Thread& thread = *current();
  if (options.check_races && mbarrier.initialiser != &thread &&
      thread.clock.seen[mbarrier.initialiser->actor] < mbarrier.initialised_at && first_time(kRace, site)) {
    finding(kRace, format("%s used by %s %s before its initialisation is visible there",
                          name_of(mbarrier).c_str(), name_of(thread).c_str(), at(site).c_str()));
  }
  return mbarrier;
}

void mbarrier_init(uint32_t address, int arrivals) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  address = own_address(*thread.block, address, site);
  shared_at(access_by(thread, true, site), address, kMbarrierBytes, kMbarrierBytes);
  if (options.check_races) thread.block->shadow.reserve(address - kSharedBase, kMbarrierBytes);
  Mbarrier& mbarrier = thread.block->mbarriers[address];
  mbarrier = Mbarrier{};
  mbarrier.address = address;
  mbarrier.arrivals = mbarrier.pending = arrivals;
  mbarrier.initialiser = &thread;
  mbarrier.initialised_at = thread.clock.seen[thread.actor];
}

static void tell_tma(const Thread& thread) {
  for (auto& [address, mbarrier] : thread.block->mbarriers) {
    if (mbarrier.initialiser == &thread && !mbarrier.fenced_at) mbarrier.fenced_at = thread.clock.seen[thread.actor];
  }
}

void fence_mbarrier_init() {
  Thread& thread = *current();
  tell_tma(thread);
  if (options.check_races) release(thread, thread.fenced_initialisations);
}

void complete_if_done(Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.arrivals;
  mbarrier.completed.join(mbarrier.arriving);
  mbarrier.arriving = {};
  std::vector<Thread*> waiting;
  waiting.swap(mbarrier.waiting);
  for (Thread* thread : waiting) {
    thread->clock.join(mbarrier.completed);
    make_ready(*thread);
  }
}

static void arrive(Block& block, uint32_t address, int expected_bytes, Site site) {
  Thread& thread = *current();
  Mbarrier& mbarrier = mbarrier_at(block, address, site);
  if (mbarrier.pending == 0) {
    fault(kBarrier, format("more than %d arrivals at %s in phase %u, %s", mbarrier.arrivals,
                           name_of(mbarrier).c_str(), mbarrier.phase, at(site).c_str()));
  }
  mbarrier.bytes += expected_bytes;
  --mbarrier.pending;
  if (options.check_races) release(thread, mbarrier.arriving);
  complete_if_done(mbarrier);
}

void mbarrier_arrive(uint32_t address, int expected_bytes) {
  const Site site = __builtin_return_address(0);
  Block& block = *current()->block;
  arrive(block, own_address(block, address, site), expected_bytes, site);
}

void mbarrier_arrive_mapped(uint32_t address) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  Block& block = block_of(thread, address, site);
  if (&block != thread.block) reach_into(block, thread.actor, thread.clock.seen[thread.actor]);
  arrive(block, own_address(block, address, site), 0, site);
}

void land_bytes(Mbarrier& mbarrier, uint32_t phase, int64_t bytes, Site load) {
  mbarrier.bytes -= bytes;
  if (mbarrier.phase != phase || (mbarrier.pending == 0 && mbarrier.bytes < 0)) {
    fault(kBarrier, format("the copy %s brings more bytes than phase %u of %s expects", at(load).c_str(), phase,
                           name_of(mbarrier).c_str()));
  }
}

static bool has_completed(const Mbarrier& mbarrier, uint32_t parity) { return (mbarrier.phase & 1) != parity; }

static std::string missing(const Block& block, uint32_t address) {
  const Mbarrier& mbarrier = block.mbarriers.at(address);
  return format("%s, phase %u: %d of %d arrivals and %lld bytes missing", name_of(mbarrier).c_str(), mbarrier.phase,
                mbarrier.pending, mbarrier.arrivals, static_cast<long long>(mbarrier.bytes));
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  address = own_address(*thread.block, address, site);
  Mbarrier& mbarrier = mbarrier_at(*thread.block, address, site);
  if (!has_completed(mbarrier, parity)) {
    poll({"mbarrier.try_wait", site, missing, address});
    return false;
  }
  thread.clock.join(mbarrier.completed);
  return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  address = own_address(*thread.block, address, site);
  Mbarrier& mbarrier = mbarrier_at(*thread.block, address, site);
  // A waiter that sleeps through a whole phase finds the parity it asks for only two phases later, as on hardware.
  while (!has_completed(mbarrier, parity)) {
    mbarrier.waiting.push_back(&thread);
    park({"mbarrier wait", site, missing, address});
  }
  thread.clock.join(mbarrier.completed);
}

void fence_proxy_async() {
  Thread& thread = *current();
  tell_tma(thread);
  thread.clock.fenced.join(thread.clock.seen);
  thread.clock.seen.raise(thread.actor, thread.clock.seen[thread.actor] + 1);
}

}  // namespace emu
