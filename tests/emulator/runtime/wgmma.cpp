#include "wgmma.h"

#include <string.h>

#include "machine.h"
#include "scheduler.h"
#include "wgmma_operands.h"

namespace emu {

constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr uint32_t kMark = 0x7fffdead;  // a NaN no kernel makes
constexpr size_t kMostKnown = 64;

static Warp& warp_of(const Lanes& lanes) { return lanes.block.warps[lanes.warp]; }
static int first_warp(int warp) { return warp / kWarpgroupWarps * kWarpgroupWarps; }

// ---- computing

static void compute(Block& block, int warp, Product& product) {
  if (product.computed) return;
  product.computed = true;
  const WgmmaOperands& operands = product.operands;
  const int actor = block.warps[warp].products.actor;
  static float a[16][kMostColumns], b[16][kMostColumns];
  if (operands.a_registers) {
    read_fragments(product, a);
  } else {
    const int first = warp % kWarpgroupWarps * kWarpRows;
    read_matrix(product, block, actor, operands.a, operands.transposed_a, first, kWarpRows, a);
  }
  read_matrix(product, block, actor, operands.b, operands.transposed_b, 0, operands.n, b);
  for (int row = 0; row < kWarpRows; ++row) {
    float* const d = product.accumulator->values[row];
    if (!operands.accumulate) memset(d, 0, sizeof(float) * operands.n);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < operands.n; ++n) d[n] += a[k][row] * b[k][n];
    }
  }
}

// ---- registers

static uint64_t checksum(const KnownRegisters& known) {
  uint64_t sum = 1469598103934665603ull;
  for (const void* registers : known.registers) {
    for (size_t i = 0; i < known.bytes; i += 8) {
      uint64_t word;
      memcpy(&word, static_cast<const char*>(registers) + i, 8);
      sum = (sum ^ word) * 0x9E3779B97F4A7C15ull;
    }
  }
  return sum;
}

// Registers of an earlier product must not have changed since the last wgmma.fence; from now on these are known.
static void require_fenced(ProductQueue& queue, const std::array<const void*, 32>& registers, size_t bytes, bool read,
                           const char* what, Site site) {
  for (const KnownRegisters& known : queue.known) {
    if (known.registers[0] != registers[0] || known.bytes != bytes) continue;
    if (read && checksum(known) != known.sum_at_fence) {
      fault(kInFlight, format("%s of the wgmma %s were written after the last wgmma.fence", what, at(site).c_str()));
    }
    return;
  }
  if (queue.known.size() >= kMostKnown) queue.known.erase(queue.known.begin());
  KnownRegisters known{registers, bytes};
  known.sum_at_fence = checksum(known);
  queue.known.push_back(known);
}

static void save_accumulator(Accumulator& accumulator) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < accumulator.n / 2; ++i) {
      float& d = accumulator.registers[lane][i];
      accumulator.values[accumulator_row(lane, i)][accumulator_column(lane, i)] = d;
      memcpy(&d, &kMark, sizeof d);
    }
  }
}

static void write_back(const Accumulator& accumulator, Site issue) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < accumulator.n / 2; ++i) {
      float& d = accumulator.registers[lane][i];
      if (memcmp(&d, &kMark, sizeof d)) {
        fault(kInFlight, format("accumulator register %d of lane %d was written while the wgmma %s was in flight", i,
                                lane, at(issue).c_str()));
      }
      d = accumulator.values[accumulator_row(lane, i)][accumulator_column(lane, i)];
    }
  }
}

// ---- issue

static Accumulator& accumulator_for(const Lanes& lanes, ProductQueue& queue) {
  const WgmmaOperands& first = lanes.of<WgmmaOperands>(0);
  for (Accumulator& accumulator : queue.accumulators) {
    if (accumulator.registers[0] != first.d) continue;
    if (accumulator.n != first.n) {
      fault(kInFlight, "wgmma of another shape on an accumulator in flight, " + at(lanes.site));
    }
    return accumulator;
  }
  if (!queue.fenced) {
    fault(kInFlight, "wgmma " + at(lanes.site) + " uses registers without a wgmma.fence after the last wait");
  }
  Accumulator& accumulator = queue.accumulators.emplace_back();
  std::array<const void*, 32> registers;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    registers[lane] = accumulator.registers[lane] = lanes.of<WgmmaOperands>(lane).d;
  }
  accumulator.n = first.n;
  require_fenced(queue, registers, accumulator.n / 2 * sizeof(float), first.accumulate, "accumulators", lanes.site);
  save_accumulator(accumulator);
  return accumulator;
}

static void do_issue(const Lanes& lanes) {
  Warp& warp = warp_of(lanes);
  ProductQueue& queue = warp.products;
  const WgmmaOperands& first = lanes.of<WgmmaOperands>(0);
  for (int lane = 1; lane < kWarpLanes; ++lane) {
    const WgmmaOperands& other = lanes.of<WgmmaOperands>(lane);
    if (other.a != first.a || other.b != first.b || other.accumulate != first.accumulate) {
      fault(kCollective, format("wgmma %s: lane %d has other descriptors than lane 0", at(lanes.site).c_str(), lane));
    }
  }
  if (queue.actor < 0) queue.actor = new_actor(lanes.block, format("wgmma of warp %d", lanes.warp));
  Product& product = queue.pending.emplace_back();
  product.operands = first;
  product.site = lanes.site;
  product.accumulator = &accumulator_for(lanes, queue);
  ++product.accumulator->unfinished;
  if (first.a_registers) {
    std::array<const void*, 32> registers;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      registers[lane] = product.a_registers[lane] = lanes.of<WgmmaOperands>(lane).a_registers;
      memcpy(product.a_values[lane].data(), product.a_registers[lane], 4 * sizeof(uint32_t));
    }
    require_fenced(queue, registers, 4 * sizeof(uint32_t), true, "A registers", lanes.site);
  }
  product.group = queue.groups;
  product.step = ++queue.issued;
  product.clock = lanes.thread(0).clock;
  queue.hash = (queue.hash * 31 + first.a * 7 + first.b) * 0x9E3779B97F4A7C15ull + first.n;
  if (random_below(2)) {
    for (Product& earlier : queue.pending) compute(lanes.block, lanes.warp, earlier);
  }
}

void wgmma(const WgmmaOperands& operands) {
  meet(kWholeWarp, {"wgmma", do_issue, operands.n * 8 + operands.bf16, true}, __builtin_return_address(0),
       const_cast<WgmmaOperands*>(&operands));
}

static void do_fence(const Lanes& lanes) {
  ProductQueue& queue = warp_of(lanes).products;
  queue.fenced = true;
  for (KnownRegisters& known : queue.known) known.sum_at_fence = checksum(known);
}

void wgmma_fence() { meet(kWholeWarp, {"wgmma.fence", do_fence, 0, true}, __builtin_return_address(0), nullptr); }

static void do_commit(const Lanes& lanes) {
  ProductQueue& queue = warp_of(lanes).products;
  ++queue.groups;
  queue.group_ends.push_back(queue.issued);
  queue.group_hashes.push_back(queue.hash);
  queue.hash = 0;
  std::vector<Thread*> waiting;
  waiting.swap(lanes.block.warps[first_warp(lanes.warp)].products.waiting);
  for (Thread* thread : waiting) make_ready(*thread);
}

void wgmma_commit() {
  meet(kWholeWarp, {"wgmma.commit_group", do_commit, 0, true}, __builtin_return_address(0), nullptr);
}

// ---- wait

static void finish(const Lanes& lanes, ProductQueue& queue, uint32_t done) {
  for (auto it = queue.pending.begin(); it != queue.pending.end() && it->group < done; it = queue.pending.erase(it)) {
    if (it->operands.a_registers) {
      for (int lane = 0; lane < kWarpLanes; ++lane) {
        if (memcmp(it->a_registers[lane], it->a_values[lane].data(), 4 * sizeof(uint32_t))) {
          fault(kInFlight, format("A registers of lane %d changed while the wgmma %s was in flight", lane,
                                  at(it->site).c_str()));
        }
      }
    }
    if (--it->accumulator->unfinished == 0) {
      write_back(*it->accumulator, it->site);
      queue.accumulators.remove_if([](const Accumulator& accumulator) { return accumulator.unfinished == 0; });
    }
  }
}

static void do_wait(const Lanes& lanes) {
  ProductQueue& queue = warp_of(lanes).products;
  const int pending = lanes.of<int>(0);
  queue.fenced = false;
  if (queue.groups <= static_cast<uint32_t>(pending)) return;
  const uint32_t done = queue.groups - pending;
  for (int i = 0; i < kWarpgroupWarps; ++i) {
    const int warp = first_warp(lanes.warp) + i;
    ProductQueue& other = lanes.block.warps[warp].products;
    for (Product& product : other.pending) {
      if (product.group < done) compute(lanes.block, warp, product);
    }
    if (other.actor < 0) continue;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      lanes.thread(lane).clock.seen.raise(other.actor, other.group_ends[done - 1]);
    }
  }
  finish(lanes, queue, done);
}

static std::string missing_warps(const Block& block, uint32_t warp) {
  std::string text = "groups committed by the warps of the warpgroup:";
  for (int i = 0; i < kWarpgroupWarps; ++i) {
    text += format(" %u", block.warps[first_warp(static_cast<int>(warp)) + i].products.groups);
  }
  return text;
}

// One operation of the warpgroup: it is over for a warp only when all four have issued it, and then for the reads of
// all four.
void wgmma_wait(int pending) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  Block& block = *thread.block;
  const int first = first_warp(thread.warp);
  if (first + kWarpgroupWarps > static_cast<int>(block.warps.size())) {
    fault(kCollective, "wgmma " + at(site) + " in a warpgroup of less than four warps");
  }
  const ProductQueue& own = block.warps[thread.warp].products;
  const uint32_t done = own.groups > static_cast<uint32_t>(pending) ? own.groups - pending : 0;
  const auto behind = [&] {
    for (int i = 0; i < kWarpgroupWarps; ++i) {
      if (block.warps[first + i].products.groups < done) return true;
    }
    return false;
  };
  while (behind()) {
    block.warps[first].products.waiting.push_back(&thread);
    park({"wgmma.wait_group", site, missing_warps, static_cast<uint32_t>(thread.warp)});
  }
  for (int i = 0; done > 0 && i < kWarpgroupWarps; ++i) {
    if (block.warps[first + i].products.group_hashes[done - 1] != own.group_hashes[done - 1]) {
      fault(kCollective, "the warps of the warpgroup issued different wgmma before the wait " + at(site));
    }
  }
  meet(kWholeWarp, {"wgmma.wait_group", do_wait, pending, true}, site, &pending);
}

void check_no_products_pending(const Thread& thread) {
  const ProductQueue& queue = thread.block->warps[thread.warp].products;
  if (!queue.pending.empty()) {
    fault(kInFlight, "the warp exits without having waited for its wgmma " + at(queue.pending.front().site));
  }
}

// ---- setmaxnreg: every warp of the warpgroup runs it; how many registers there are is not modelled

static void do_nothing(const Lanes&) {}

void set_max_registers(int registers) {
  meet(kWholeWarp, {"setmaxnreg", do_nothing, registers, true}, __builtin_return_address(0), nullptr);
}

}  // namespace emu
