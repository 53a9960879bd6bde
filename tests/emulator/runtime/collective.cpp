#include "collective.h"

#include <limits.h>

#include <algorithm>

#include "machine.h"
#include "scheduler.h"

namespace emu {

Thread& Lanes::thread(int lane) const { return *block.threads[warp * kWarpLanes + lane]; }

static Rendezvous& find_meeting(Warp& warp, uint32_t mask, const Collective& collective, Site site) {
  Rendezvous* unused = nullptr;
  for (Rendezvous& meeting : warp.meetings) {
    if (!meeting.arrived) {
      unused = &meeting;
    } else if (meeting.mask == mask) {
      return meeting;
    } else if (meeting.mask & mask) {
      fault(kCollective, format("%s %s with mask %08x, while lanes %08x wait in %s with mask %08x %s",
                                collective.what, at(site).c_str(), mask, meeting.arrived, meeting.what, meeting.mask,
                                at(meeting.site).c_str()));
    }
  }
  if (!unused) {
    fault(kCollective, format("%s %s: the warp is split over too many collectives", collective.what, at(site).c_str()));
  }
  *unused = Rendezvous{mask, 0, collective.work, collective.what, collective.variant, site, {}};
  return *unused;
}

static std::string missing_lanes(const Block& block, uint32_t warp) {
  std::string text;
  for (const Rendezvous& meeting : block.warps[warp].meetings) {
    if (meeting.arrived) {
      text += format("%swarp %u: lanes %08x of %08x have arrived", text.empty() ? "" : "; ", warp, meeting.arrived,
                     meeting.mask);
    }
  }
  return text;
}

void meet(uint32_t mask, const Collective& collective, Site site, void* argument) {
  Thread& thread = *current();
  Warp& warp = warp_of(thread);
  if (!(mask >> thread.lane & 1)) {
    fault(kCollective, format("%s %s: mask %08x lacks the calling lane %d", collective.what, at(site).c_str(), mask,
                              thread.lane));
  }
  mask &= warp.lanes;
  Rendezvous& meeting = find_meeting(warp, mask, collective, site);
  const bool same_operation = meeting.work == collective.work && meeting.variant == collective.variant;
  if (!same_operation || (collective.aligned && meeting.site != site)) {
    const std::string message =
        format("%s %s, while lanes %08x of the warp are in %s %s", collective.what, at(site).c_str(), meeting.arrived,
               meeting.what, at(meeting.site).c_str());
    // g++ may have copied one instruction to two places.
    if (!same_operation) fault(kCollective, message);
    if (first_time(kDivergence, site, meeting.site)) finding(kDivergence, message);
  }
  meeting.arrived |= 1u << thread.lane;
  meeting.arguments[thread.lane] = argument;
  if (meeting.arrived != mask) {
    park({collective.what, site, missing_lanes, static_cast<uint32_t>(thread.warp)});
    return;
  }
  const Lanes lanes{*thread.block, thread.warp, mask, site, meeting.arguments.data()};
  collective.work(lanes);
  meeting.arrived = 0;
  if (mask == warp.lanes) flush_banks(warp.bank_requests);
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes.has(lane) && lane != thread.lane) make_ready(lanes.thread(lane));
  }
}

// ---- shuffles

struct ShuffleArgument {
  uint32_t value, result;
  int argument, width;
  Shuffle mode;
};

static int source_lane(int lane, const ShuffleArgument& x) {
  const int first = lane / x.width * x.width;
  const int within = lane - first;
  switch (x.mode) {
    case Shuffle::kIndex: return first + (x.argument & (x.width - 1));
    case Shuffle::kXor: return (within ^ x.argument) < x.width ? first + (within ^ x.argument) : lane;
    case Shuffle::kUp: return within >= x.argument ? lane - x.argument : lane;
    case Shuffle::kDown: return within + x.argument < x.width ? lane + x.argument : lane;
  }
  return lane;
}

static void do_shuffle(const Lanes& lanes) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!lanes.has(lane)) continue;
    ShuffleArgument& mine = lanes.of<ShuffleArgument>(lane);
    const int source = source_lane(lane, mine);
    if (!lanes.has(source)) {
      fault(kCollective, format("shuffle %s: lane %d reads lane %d, which is not in mask %08x", at(lanes.site).c_str(),
                                lane, source, lanes.mask));
    }
    mine.result = lanes.of<ShuffleArgument>(source).value;
  }
}

uint32_t shuffle(uint32_t mask, uint32_t value, int argument, int width, Shuffle mode) {
  ShuffleArgument x{value, 0, argument, width, mode};
  meet(mask, {"shuffle", do_shuffle, static_cast<int>(mode), false}, __builtin_return_address(0), &x);
  return x.result;
}

// ---- votes and reductions

struct VoteArgument {
  uint32_t value, result;
  Vote mode;
};

static void do_vote(const Lanes& lanes) {
  uint32_t any = 0, all = ~0u, ballot = 0, sum = 0;
  int most = INT_MIN, least = INT_MAX;
  Vote mode = Vote::kAny;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!lanes.has(lane)) continue;
    const VoteArgument& x = lanes.of<VoteArgument>(lane);
    any |= x.value;
    all &= x.value;
    ballot |= (x.value & 1) << lane;
    sum += x.value;
    most = std::max(most, static_cast<int>(x.value));
    least = std::min(least, static_cast<int>(x.value));
    mode = x.mode;
  }
  uint32_t result = any;
  switch (mode) {
    case Vote::kAny: case Vote::kOr: result = any; break;
    case Vote::kAll: case Vote::kAnd: result = all; break;
    case Vote::kBallot: result = ballot; break;
    case Vote::kMax: result = static_cast<uint32_t>(most); break;
    case Vote::kMin: result = static_cast<uint32_t>(least); break;
    case Vote::kAdd: result = sum; break;
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes.has(lane)) lanes.of<VoteArgument>(lane).result = result;
  }
}

uint32_t vote(uint32_t mask, uint32_t value, Vote mode) {
  VoteArgument x{value, 0, mode};
  meet(mask, {"vote", do_vote, static_cast<int>(mode), false}, __builtin_return_address(0), &x);
  return x.result;
}

uint32_t active_mask() { return warp_of(*current()).lanes; }

// ---- __syncwarp: the only collective that orders the lanes' memory accesses

static void do_sync(const Lanes& lanes) {
  if (!options.check_races) return;
  Clock together;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes.has(lane)) release(lanes.thread(lane), together);
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lanes.has(lane)) lanes.thread(lane).clock.join(together);
  }
}

void sync_warp(uint32_t mask) {
  meet(mask, {"__syncwarp", do_sync, 0, false}, __builtin_return_address(0), nullptr);
}

}  // namespace emu
