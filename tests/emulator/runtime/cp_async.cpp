#include "cp_async.h"

#include <string.h>

#include "machine.h"
#include "memory.h"

namespace emu {

constexpr int kPoison = 0xff;  // NaN in every float format

void cp_async(uint32_t target, const void* source, int bytes, int source_bytes) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  CopyQueue& queue = thread.copies;
  target = own_address(*thread.block, target, site);
  if (queue.actor < 0) queue.actor = new_actor(*thread.block, format("cp.async of thread %d", thread.id));
  if (source_bytes < 0 || source_bytes > bytes) {
    fault(kLaunch, format("cp.async of %d bytes with %d source bytes %s", bytes, source_bytes, at(site).c_str()));
  }
  Access access{thread.block, queue.actor, queue.groups + 1, &thread.clock, true, true, false, site};
  unsigned char* const destination = shared_at(access, target, bytes, bytes);
  if (options.count_banks) count_bank_access(thread, target - kSharedBase, bytes, true, site);
  access.write = false;
  if (source_bytes > 0) check_global(access, source, source_bytes, source_bytes == bytes);
  memset(destination, kPoison, bytes);
  queue.pending.push_back({destination, static_cast<const unsigned char*>(source), bytes, source_bytes, queue.groups,
                           site});
}

void cp_async_commit() { ++current()->copies.groups; }

void cp_async_wait(int pending) {
  Thread& thread = *current();
  CopyQueue& queue = thread.copies;
  const uint32_t done = queue.groups > static_cast<uint32_t>(pending) ? queue.groups - pending : 0;
  size_t kept = 0;
  for (const Copy& copy : queue.pending) {
    if (copy.group >= done) {
      queue.pending[kept++] = copy;
      continue;
    }
    memcpy(copy.target, copy.source, copy.source_bytes);
    memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  queue.pending.resize(kept);
  if (queue.actor >= 0) thread.clock.seen.raise(queue.actor, done);
}

void check_no_copies_pending(const Thread& thread) {
  if (!thread.copies.pending.empty()) {
    fault(kInFlight, "the thread exits without having waited for its cp.async " + at(thread.copies.pending[0].site));
  }
}

}  // namespace emu
