// wgmma: products of a warpgroup that run behind its four warps. Each warp's sixteen rows are computed at a random
// time between the issue and the wait. Until then accumulators hold a marked NaN, and neither they nor A registers may
// change.
#pragma once
#include <stdint.h>

#include <array>
#include <list>
#include <vector>

#include "clock.h"
#include "kernel_api.h"
#include "report.h"

namespace emu {

struct Block;
struct Thread;

constexpr int kWarpRows = 16;
constexpr int kMostColumns = 256;
constexpr int kWarpgroupWarps = 4;

struct Accumulator {
  std::array<float*, 32> registers;  // by lane
  int n;
  int unfinished = 0;  // products issued and not waited for
  float values[kWarpRows][kMostColumns];
};

struct Product {
  WgmmaOperands operands;  // lane 0's
  Accumulator* accumulator;
  std::array<const uint32_t*, 32> a_registers;
  std::array<std::array<uint32_t, 4>, 32> a_values;  // at the issue
  uint32_t group, step;
  bool computed = false;
  Clock clock;
  Site site;
};

// Registers some product has used: what wgmma.fence has to make visible when they change.
struct KnownRegisters {
  std::array<const void*, 32> registers;
  size_t bytes;
  uint64_t sum_at_fence = 0;
};

struct ProductQueue {  // of one warp
  std::list<Product> pending;
  std::list<Accumulator> accumulators;  // in flight
  std::vector<KnownRegisters> known;
  uint32_t groups = 0;  // committed so far
  uint32_t issued = 0;  // products
  std::vector<uint32_t> group_ends;     // products issued when each group was committed
  std::vector<uint64_t> group_hashes;   // of what each group's products were: warps must agree
  uint64_t hash = 0;
  bool fenced = false;
  int actor = -1;  // steps are products
  std::vector<Thread*> waiting;  // for the warpgroup's other warps, in the warpgroup's first warp
};

void check_no_products_pending(const Thread& thread);

}  // namespace emu
