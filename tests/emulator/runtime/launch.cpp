#include "launch.h"

#include <algorithm>

#include "atomics.h"
#include "deadlock.h"
#include "machine.h"
#include "memory.h"
#include "scheduler.h"
#include "tensor_map.h"
#include "traps.h"

namespace emu {

constexpr unsigned kMostThreads = 1024;
constexpr int kMostResident = 16;

Options options;

struct Launch {
  void (*invoke)(void** arguments);
  void** arguments;
  Dim3 grid, block_dim;
  size_t shared_bytes;
  uint64_t started = 0;  // blocks
};

static Launch launch;
static std::unique_ptr<Block> resident[kMostResident];
static uint32_t next_serial = 1;
static uint32_t first_serial = 1;

uint32_t first_serial_of_launch() { return first_serial; }

std::vector<const Block*> resident_blocks() {
  std::vector<const Block*> blocks;
  for (const auto& block : resident) {
    if (block) blocks.push_back(block.get());
  }
  return blocks;
}

std::string name_of(const Block& block) {
  return format("block (%u, %u, %u)", block.block_index.x, block.block_index.y, block.block_index.z);
}

std::string name_of(const Thread& thread) { return name_of(*thread.block) + format(" thread %d", thread.id); }

static void run_thread() {
  launch.invoke(launch.arguments);
  check_no_copies_pending(*current());
  check_no_stores_pending(*current());
  check_no_products_pending(*current());
  if (options.check_races) current()->block->at_exit.join(current()->clock);
  leave_cluster(*current());
  exit_thread();
}

static void start_block(int slot, const std::shared_ptr<Cluster>& cluster) {
  resident[slot] = std::make_unique<Block>();
  Block& block = *resident[slot];
  cluster->blocks.push_back(&block);
  const uint64_t index = launch.started++;
  block.block_index = {static_cast<unsigned>(index % launch.grid.x),
                       static_cast<unsigned>(index / launch.grid.x % launch.grid.y),
                       static_cast<unsigned>(index / launch.grid.x / launch.grid.y)};
  block.block_dim = launch.block_dim;
  block.grid_dim = launch.grid;
  block.shared = shared_window(slot);
  block.shared_bytes = launch.shared_bytes;
  block.slot = slot;
  block.cluster = cluster;
  block.rank = static_cast<uint32_t>(cluster->blocks.size()) - 1;
  prepare_shared(block.shared, block.shared_bytes);
  block.shadow.reset(block.shared_bytes);

  const Dim3& dim = launch.block_dim;
  block.live = static_cast<int>(dim.x * dim.y * dim.z);
  cluster->live += block.live;
  block.warps.resize((block.live + kWarpLanes - 1) / kWarpLanes);
}

static void start_threads(Block& block) {
  const Dim3& dim = launch.block_dim;
  for (int id = 0; id < block.live; ++id) {
    auto thread = std::make_unique<Thread>();
    thread->view = &block;
    thread->block = &block;
    thread->thread_index = {id % dim.x, id / dim.x % dim.y, id / dim.x / dim.y};
    thread->id = id;
    thread->lane = id % kWarpLanes;
    thread->warp = id / kWarpLanes;
    thread->actor = new_actor(block, format("thread %d", id));
    thread->clock.seen.raise(thread->actor, 1);
    block.warps[thread->warp].lanes |= 1u << thread->lane;
    start_fibre(thread->fibre, block.slot * static_cast<int>(kMostThreads) + id, run_thread);
    make_ready(*thread);
    block.threads.push_back(std::move(thread));
  }
}

// The next cluster, in slots from `first` on: all of its blocks start together.
static void start_cluster(int first) {
  const auto cluster = std::make_shared<Cluster>();
  cluster->serial = next_serial++;
  for (int slot = first; slot < first + options.cluster_blocks; ++slot) start_block(slot, cluster);
  for (Block* block : cluster->blocks) start_threads(*block);
}

static void finish_block(Block& block) {
  check_shared_guards(block);
  end_transfers(block);
  check_nobody_reaches_into(block);
  for (Warp& warp : block.warps) flush_banks(warp.bank_requests);
  block.ended = true;
}

static void run_launch() {
  const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  const int together = options.cluster_blocks;
  const int clusters = std::max(1, std::min(options.resident_blocks, kMostResident) / together);
  for (;;) {
    bool any = false;
    for (int first = 0; first < clusters * together; first += together) {
      const auto begin = resident + first, end = begin + together;
      for (auto block = begin; block < end; ++block) {
        if (*block && !(*block)->ended && (*block)->live == 0) finish_block(**block);
      }
      if (std::all_of(begin, end, [](const auto& block) { return block && block->ended; })) {
        std::for_each(begin, end, [](auto& block) { block.reset(); });
      }
      if (!*begin && launch.started < blocks) start_cluster(first);
      any |= *begin != nullptr;
    }
    if (!any) return;
    if (!run_threads()) fault(kDeadlock, describe_deadlock());
    if (any_fault()) return;
  }
}

}  // namespace emu

using namespace emu;

extern "C" {

EMU_ENTRY void* emu_allocate(size_t bytes) { return allocate_global(bytes); }
EMU_ENTRY void emu_free(void* pointer) { free_global(pointer); }
EMU_ENTRY int emu_is_global(const void* pointer) { return in_global_arena(pointer); }
EMU_ENTRY Options* emu_options() { return &options; }
EMU_ENTRY const char* emu_findings() { return findings_text(); }
EMU_ENTRY int emu_encode_tensor_map(void* map, int data_type, uint32_t rank, void* address, const uint64_t* shape,
                                    const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                    int interleave, int swizzle, int l2_promotion, int fill) {
  return encode_tensor_map(map, data_type, rank, address, shape, strides, box, element_strides, interleave, swizzle,
                           l2_promotion, fill);
}
EMU_ENTRY void emu_clear_bank_counts() { clear_bank_counts(); }
EMU_ENTRY const char* emu_bank_counts() {
  static std::string text;
  text = bank_counts();
  return text.c_str();
}

// Runs a grid to its end or to its first fault; emu_findings tells what was found.
EMU_ENTRY void emu_launch(void (*invoke)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                          size_t shared_bytes) {
  clear_findings();
  forget_messages();
  reset_scheduler(options.seed);
  first_serial = next_serial;
  launch = {invoke, arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes};
  const TrapGuard traps;
  try {
    if (shared_bytes > kMostShared || block[0] * block[1] * block[2] > kMostThreads) {
      fault(kLaunch, format("%u × %u × %u threads with %zu bytes of shared memory do not fit a multiprocessor",
                            block[0], block[1], block[2], shared_bytes));
    }
    if (options.cluster_blocks > kMostResident || grid[0] % options.cluster_blocks) {
      fault(kLaunch, format("a grid of %u blocks is not made of clusters of %d", grid[0], options.cluster_blocks));
    }
    run_launch();
  } catch (const LaunchAbandoned&) {
  }
  running = nullptr;
  cancel_transfers();
  for (auto& left : resident) left.reset();
  if (!any_fault()) check_global_guards();
}

}  // extern "C"
