#include "launch.h"

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
  exit_thread();
}

static void start_block(int slot) {
  resident[slot] = std::make_unique<Block>();
  Block& block = *resident[slot];
  const uint64_t index = launch.started++;
  block.block_index = {static_cast<unsigned>(index % launch.grid.x),
                       static_cast<unsigned>(index / launch.grid.x % launch.grid.y),
                       static_cast<unsigned>(index / launch.grid.x / launch.grid.y)};
  block.block_dim = launch.block_dim;
  block.grid_dim = launch.grid;
  block.shared = shared_window(slot);
  block.shared_bytes = launch.shared_bytes;
  block.serial = next_serial++;
  block.slot = slot;
  prepare_shared(block.shared, block.shared_bytes);
  block.shadow.reset(block.shared_bytes);

  const Dim3& dim = launch.block_dim;
  block.live = static_cast<int>(dim.x * dim.y * dim.z);
  block.warps.resize((block.live + kWarpLanes - 1) / kWarpLanes);
  for (int id = 0; id < block.live; ++id) {
    auto thread = std::make_unique<Thread>();
    thread->view = &block;
    thread->block = &block;
    thread->thread_index = {id % dim.x, id / dim.x % dim.y, id / dim.x / dim.y};
    thread->id = id;
    thread->lane = id % kWarpLanes;
    thread->warp = id / kWarpLanes;
    thread->clock.seen.raise(id, 1);
    block.warps[thread->warp].lanes |= 1u << thread->lane;
    new_actor(block, format("thread %d", id));
    start_fibre(thread->fibre, slot * static_cast<int>(kMostThreads) + id, run_thread);
    make_ready(*thread);
    block.threads.push_back(std::move(thread));
  }
}

static void finish_block(std::unique_ptr<Block>& block) {
  check_shared_guards(*block);
  end_transfers(*block);
  for (Warp& warp : block->warps) flush_banks(warp.bank_requests);
  block.reset();
}

static void run_launch() {
  const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  const int slots = std::min(options.resident_blocks, kMostResident);
  for (;;) {
    bool any = false;
    for (int slot = 0; slot < slots; ++slot) {
      if (resident[slot] && resident[slot]->live == 0) finish_block(resident[slot]);
      if (!resident[slot] && launch.started < blocks) start_block(slot);
      any |= resident[slot] != nullptr;
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
    run_launch();
  } catch (const LaunchAbandoned&) {
  }
  running = nullptr;
  cancel_transfers();
  for (auto& left : resident) left.reset();
  if (!any_fault()) check_global_guards();
}

}  // extern "C"
