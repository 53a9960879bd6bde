// Atomics, releases and acquires on global memory. What a thread knows at its release, or at its last __threadfence
// before a plain atomic, passes to whoever acquires from that address later. Atomics on shared memory order nothing.
#include "atomics.h"

#include <string.h>

#include <algorithm>
#include <map>

#include "machine.h"
#include "memory.h"
#include "scheduler.h"

namespace emu {

static std::map<const void*, Clock> messages;  // left at an address by fenced threads

void forget_messages() { messages.clear(); }

// What `thread` knows, for threads of any block: steps of its own cluster travel under the cluster's serial number.
static Clock outgoing(Thread& thread) {
  Clock known;
  known.others = thread.clock.others;
  known.others[thread.block->cluster->serial].join(thread.clock.seen);
  thread.clock.seen.raise(thread.actor, thread.clock.seen[thread.actor] + 1);
  return known;
}

static void learn(Thread& thread, const Clock& message) {
  thread.clock.join(message);
  const auto own = message.others.find(thread.block->cluster->serial);
  if (own != message.others.end()) thread.clock.seen.join(own->second);
}

void thread_fence() {
  if (options.check_races) current()->fenced = outgoing(*current());
}

static uint32_t combine(Atomic operation, uint32_t old, uint32_t value, uint32_t compare) {
  switch (operation) {
    case Atomic::kAddInt: return old + value;
    case Atomic::kAddFloat: {
      float a, b;
      memcpy(&a, &old, 4);
      memcpy(&b, &value, 4);
      a += b;
      memcpy(&old, &a, 4);
      return old;
    }
    case Atomic::kIncrement: return old >= value ? 0 : old + 1;
    case Atomic::kMax: return static_cast<uint32_t>(std::max(static_cast<int>(old), static_cast<int>(value)));
    case Atomic::kOr: return old | value;
    case Atomic::kExchange: return value;
    case Atomic::kCompareAndSwap: return old == compare ? value : old;
  }
  return old;
}

uint32_t atomic(Atomic operation, void* pointer, uint32_t value, uint32_t compare) {
  Thread& thread = *current();
  const Site site = __builtin_return_address(0);
  if (in_shared_windows(pointer)) {
    const long offset = static_cast<unsigned char*>(pointer) - thread.block->shared;
    require_shared(*thread.block, static_cast<uint32_t>(offset + kSharedBase), 4, 4, true, site);
  } else {
    require_global(pointer, 4, true, true, site);
    if (options.check_races) {
      Clock& message = messages[pointer];
      learn(thread, message);
      message.join(thread.fenced);
    }
  }
  uint32_t* const word = static_cast<uint32_t*>(pointer);
  const uint32_t old = *word;
  *word = combine(operation, old, value, compare);
  return old;
}

uint32_t load_acquire(const void* pointer) {
  Thread& thread = *current();
  const Site site = __builtin_return_address(0);
  require_global(pointer, 4, true, false, site);
  poll({"ld.acquire in a polling loop", site});
  if (options.check_races) learn(thread, messages[pointer]);
  return *static_cast<const uint32_t*>(pointer);
}

void add_release(void* pointer, uint32_t value) {
  require_global(pointer, 4, true, true, __builtin_return_address(0));
  if (options.check_races) messages[pointer].join(outgoing(*current()));
  *static_cast<uint32_t*>(pointer) += value;
}

void add_floats(float* pointer, const float* values, int count) {
  require_global(pointer, count * sizeof(float), true, true, __builtin_return_address(0));
  for (int i = 0; i < count; ++i) pointer[i] += values[i];
}

}  // namespace emu
