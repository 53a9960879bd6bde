// Warp collectives: each lane deposits its arguments; the last to arrive does the work of all and wakes the others.
#pragma once
#include <stdint.h>

#include <array>

#include "report.h"

namespace emu {

struct Block;
struct Thread;
struct Warp;

struct Lanes {
  Block& block;
  int warp;
  uint32_t mask;
  Site site;
  void* const* arguments;  // by lane; null outside the mask

  template <class T>
  T& of(int lane) const { return *static_cast<T*>(arguments[lane]); }
  Thread& thread(int lane) const;
  bool has(int lane) const { return mask >> lane & 1; }
};

using Work = void (*)(const Lanes&);

// One open collective of a warp. A warp may have several, of disjoint masks.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  Work work = nullptr;
  const char* what = nullptr;
  int variant = 0;
  Site site = nullptr;
  std::array<void*, 32> arguments{};
};

// `aligned` instructions (mma, ldmatrix) must be the same one for all lanes; others only the same operation.
// `variant` tells operations of one kind apart (x2 from x4, xor from idx).
struct Collective {
  const char* what;
  Work work;
  int variant;
  bool aligned;
};

void meet(uint32_t mask, const Collective& collective, Site site, void* argument);

}  // namespace emu
