// Vector clocks. An actor is whatever touches memory in its own time: a thread, or an engine working behind one
// (cp.async, TMA, wgmma). Each counts its steps; a clock says up to which step of every actor all is over.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <map>
#include <vector>

namespace emu {

class Steps {
 public:
  uint32_t operator[](unsigned actor) const { return actor < steps_.size() ? steps_[actor] : 0; }
  void raise(unsigned actor, uint32_t step) {
    if (actor >= steps_.size()) steps_.resize(actor + 1);
    steps_[actor] = std::max(steps_[actor], step);
  }
  void join(const Steps& other) {
    if (other.steps_.size() > steps_.size()) steps_.resize(other.steps_.size());
    uint32_t* mine = steps_.data();
    const uint32_t* theirs = other.steps_.data();
    for (size_t i = 0, n = other.steps_.size(); i < n; ++i) mine[i] = std::max(mine[i], theirs[i]);
  }
  bool empty() const { return steps_.empty(); }

 private:
  std::vector<uint32_t> steps_;
};

struct Clock {
  Steps seen;    // over, as ordinary accesses see it
  Steps fenced;  // over, and followed by a fence.proxy.async: as TMA and wgmma see it
  std::map<uint32_t, Steps> others;  // actors of other blocks, learnt through atomics on global memory

  void join(const Clock& other) {
    seen.join(other.seen);
    fenced.join(other.fenced);
    for (const auto& [block, steps] : other.others) others[block].join(steps);
  }
};

}  // namespace emu
