#include "tma.h"

#include <string.h>

#include <algorithm>
#include <list>

#include "machine.h"
#include "memory.h"
#include "scheduler.h"
#include "tensor_map.h"

namespace emu {

static_assert(kChunk == 16, "what the swizzle moves together");

enum class Kind { kLoad, kStore, kCopy };  // kCopy: from shared memory to another block's

struct Transfer {
  Kind kind;
  TensorMap map;
  int start[kMostAxes];
  uint32_t shared, mbarrier, phase;
  Block* block;     // whose shared memory and mbarrier these are
  uint32_t source;  // kCopy: in the shared memory of the thread's block
  Thread* thread;
  uint32_t step;  // of the mbarrier's or the thread's actor
  Clock clock;    // at the issue
  Site site;
  uint32_t row = 0, rows = 1;  // a row is the box's innermost axis
};

static std::list<Transfer> transfers;

static uint32_t row_bytes(const Transfer& transfer) { return transfer.map.box[0] * transfer.map.element_bytes; }

// Where row `row` of the box starts in global memory; null if it lies outside the tensor.
static unsigned char* global_row(const Transfer& transfer, uint32_t row) {
  const TensorMap& map = transfer.map;
  unsigned char* address = reinterpret_cast<unsigned char*>(map.address);
  for (int axis = 1; axis < map.rank; ++axis) {
    const int64_t index = transfer.start[axis] + static_cast<int64_t>(row % map.box[axis]);
    row /= map.box[axis];
    if (index < 0 || index >= map.shape[axis]) return nullptr;
    address += index * static_cast<int64_t>(map.strides[axis - 1]);
  }
  return address;
}

static bool has_mbarrier(const Transfer& transfer) { return transfer.kind != Kind::kStore; }

static void copy_chunk(const Transfer& transfer, uint32_t offset) {
  const int actor = transfer.block->mbarriers.at(transfer.mbarrier).actor;
  Access access{transfer.thread->block, actor, transfer.step, &transfer.clock, false, true, true, transfer.site};
  const unsigned char* const source = shared_at(access, transfer.source + offset, kChunk, kChunk);
  access.block = transfer.block;
  access.write = true;
  memcpy(shared_at(access, transfer.shared + offset, kChunk, kChunk), source, kChunk);
}

static void move_chunk(Transfer& transfer, unsigned char* global, uint32_t row, uint32_t offset) {
  const TensorMap& map = transfer.map;
  Block& block = *transfer.block;
  const StoreQueue& stores = transfer.thread->stores;
  const bool load = transfer.kind == Kind::kLoad;
  const int reads = load ? block.mbarriers.at(transfer.mbarrier).actor : stores.reader;
  const int writes = load ? reads : stores.writer;
  const uint32_t address = swizzled(transfer.shared + row * row_bytes(transfer) + offset, map.swizzle);
  const int64_t column = transfer.start[0] + static_cast<int64_t>(offset / map.element_bytes);
  const int64_t left = static_cast<int64_t>(map.shape[0]) - column;
  const int64_t elements = std::clamp<int64_t>(left, 0, kChunk / map.element_bytes);
  const size_t inside = global && column >= 0 ? elements * map.element_bytes : 0;
  if (!inside && !load) return;  // clipped: not even read
  Access access{&block, load ? writes : reads, transfer.step, &transfer.clock, load, true, true, transfer.site};
  unsigned char* const shared = shared_at(access, address, kChunk, kChunk);
  unsigned char* const there = inside ? global + column * map.element_bytes : nullptr;
  if (inside) {
    access.actor = load ? reads : writes;
    access.write = !load;
    check_global(access, there, inside, false);
  }
  if (load) {
    if (inside) memcpy(shared, there, inside);
    memset(shared + inside, 0, kChunk - inside);
  } else {
    memcpy(there, shared, inside);
  }
}

// Moves up to `rows` rows; true when nothing is left.
static bool advance(Transfer& transfer, uint32_t rows) {
  const uint32_t first = transfer.row;
  for (; rows > 0 && transfer.row < transfer.rows; --rows, ++transfer.row) {
    if (transfer.kind == Kind::kCopy) {
      copy_chunk(transfer, transfer.row * kChunk);
      continue;
    }
    unsigned char* const global = global_row(transfer, transfer.row);
    for (uint32_t offset = 0; offset < row_bytes(transfer); offset += kChunk) {
      move_chunk(transfer, global, transfer.row, offset);
    }
  }
  const bool done = transfer.row == transfer.rows;
  if (has_mbarrier(transfer)) {
    Mbarrier& mbarrier = transfer.block->mbarriers.at(transfer.mbarrier);
    const int64_t bytes = static_cast<int64_t>(transfer.row - first) * row_bytes(transfer);
    land_bytes(mbarrier, transfer.phase, bytes, transfer.site);
    mbarrier.arriving.join(transfer.clock);
    if (done) mbarrier.arriving.seen.raise(mbarrier.actor, transfer.step);
    complete_if_done(mbarrier);
  }
  return done;
}

bool step_transfers() {
  if (transfers.empty()) return false;
  auto chosen = std::next(transfers.begin(), random_below(static_cast<uint32_t>(transfers.size())));
  if (advance(*chosen, 1 + random_below(chosen->rows))) transfers.erase(chosen);
  return true;
}

static Transfer make_transfer(Kind kind, const TensorMap& map, uint32_t shared, const int* coordinates, Site site) {
  Thread& thread = *current();
  Transfer transfer{};
  transfer.kind = kind;
  transfer.map = map;
  std::copy(coordinates, coordinates + map.rank, transfer.start);
  transfer.shared = shared;
  transfer.thread = &thread;
  transfer.block = thread.block;
  transfer.site = site;
  for (int axis = 1; axis < map.rank; ++axis) transfer.rows *= map.box[axis];
  transfer.clock = thread.clock;
  thread.clock.seen.raise(thread.actor, thread.clock.seen[thread.actor] + 1);
  return transfer;
}

// The transfer's bytes are to be counted by an mbarrier of its block.
static void start_counted(Transfer transfer, uint32_t mbarrier_address) {
  const Site site = transfer.site;
  Mbarrier& mbarrier = mbarrier_at(*transfer.block, mbarrier_address, site);
  const Thread& initialiser = *mbarrier.initialiser;
  const bool fenced = mbarrier.fenced_at && (transfer.thread == &initialiser || !options.check_races ||
                                             transfer.clock.seen[initialiser.actor] >= mbarrier.fenced_at);
  if (!fenced && first_time(kProxy, site)) {
    finding(kProxy, "TMA load " + at(site) + " reports to an mbarrier whose initialisation no fence made visible");
  }
  if (mbarrier.actor < 0) {
    mbarrier.actor = new_actor(*transfer.block, format("TMA load to mbarrier +%u", mbarrier_address - kSharedBase));
  }
  transfer.mbarrier = mbarrier_address;
  transfer.phase = mbarrier.phase;
  transfer.step = ++mbarrier.loads;
  if (transfer.block != transfer.thread->block) {
    reach_into(*transfer.block, mbarrier.actor, transfer.step);
    reach_into(*transfer.thread->block, mbarrier.actor, transfer.step);  // the other block may wait for the copy, not this
  }
  transfers.push_back(std::move(transfer));
}

// Boxes lie at multiples of 128 bytes; copies without a map at multiples of 16.
static void require_box(const TensorMap& map, uint32_t shared, bool written, Site site) {
  uint32_t bytes = map.element_bytes;
  for (int axis = 0; axis < map.rank; ++axis) bytes *= map.box[axis];
  require_shared(*current()->block, shared, bytes, 128, written, site);
}

void tma_load(uint32_t target, const void* map, uint32_t mbarrier_address, const int* coordinates, int rank) {
  const Site site = __builtin_return_address(0);
  const TensorMap decoded = decode_tensor_map(map, rank, site);
  const Block& block = *current()->block;
  target = own_address(block, target, site);
  require_box(decoded, target, true, site);
  start_counted(make_transfer(Kind::kLoad, decoded, target, coordinates, site),
                own_address(block, mbarrier_address, site));
}

void bulk_load(uint32_t target, const void* source, int bytes, uint32_t mbarrier_address) {
  const Site site = __builtin_return_address(0);
  if (bytes <= 0 || bytes % kChunk || reinterpret_cast<uintptr_t>(source) % kChunk) {
    fault(kAlignment, format("bulk load of %d bytes from %p %s: it takes multiples of 16", bytes, source, at(site).c_str()));
  }
  const Block& block = *current()->block;
  target = own_address(block, target, site);
  require_shared(block, target, bytes, kChunk, true, site);
  TensorMap line{};  // of one axis, whose elements are single bytes
  line.address = reinterpret_cast<uint64_t>(source);
  line.rank = line.element_bytes = 1;
  line.shape[0] = line.box[0] = static_cast<uint32_t>(bytes);
  constexpr int kStart = 0;
  start_counted(make_transfer(Kind::kLoad, line, target, &kStart, site), own_address(block, mbarrier_address, site));
}

void bulk_copy(uint32_t target, uint32_t source, int bytes, uint32_t mbarrier_address) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  if (bytes <= 0 || bytes % kChunk) {
    fault(kAlignment, format("bulk copy of %d bytes %s: it takes multiples of 16", bytes, at(site).c_str()));
  }
  Block& block = block_of(thread, target, site);
  target = own_address(block, target, site);
  source = own_address(*thread.block, source, site);
  require_shared(block, target, bytes, kChunk, true, site);
  require_shared(*thread.block, source, bytes, kChunk, false, site);
  constexpr int kStart = 0;
  TensorMap line{};
  line.rank = line.element_bytes = 1;
  line.box[0] = kChunk;  // counted by chunks, so that it lands in pieces
  Transfer transfer = make_transfer(Kind::kCopy, line, target, &kStart, site);
  transfer.block = &block;
  transfer.source = source;
  transfer.rows = bytes / kChunk;
  start_counted(std::move(transfer), own_address(block, mbarrier_address, site));
}

void tma_store(const void* map, uint32_t source, const int* coordinates, int rank) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *current();
  // An H100 answers such a store with an illegal instruction, though loads may start before the tensor.
  for (int axis = 0; axis < rank; ++axis) {
    if (coordinates[axis] < 0) fault(kBounds, format("TMA store from coordinate %d of axis %d ", coordinates[axis], axis) + at(site));
  }
  StoreQueue& queue = thread.stores;
  if (queue.reader < 0) {
    queue.reader = new_actor(*thread.block, format("TMA store of thread %d", thread.id));
    queue.writer = new_actor(*thread.block, format("TMA store of thread %d", thread.id));
  }
  const TensorMap decoded = decode_tensor_map(map, rank, site);
  source = own_address(*thread.block, source, site);
  require_box(decoded, source, false, site);
  Transfer transfer = make_transfer(Kind::kStore, decoded, source, coordinates, site);
  transfer.step = ++queue.issued;
  transfers.push_back(std::move(transfer));
}

void bulk_commit() {
  StoreQueue& queue = current()->stores;
  ++queue.groups;
  queue.group_ends.push_back(queue.issued);
}

void bulk_wait(int pending, bool reads_only) {
  Thread& thread = *current();
  StoreQueue& queue = thread.stores;
  if (queue.groups <= static_cast<uint32_t>(pending)) return;
  const uint32_t done = queue.group_ends[queue.groups - pending - 1];
  for (auto it = transfers.begin(); it != transfers.end();) {
    const bool waited_for = it->kind == Kind::kStore && it->thread == &thread && it->step <= done;
    if (waited_for) advance(*it, it->rows);
    it = waited_for ? transfers.erase(it) : std::next(it);
  }
  queue.read_waited = std::max(queue.read_waited, done);
  if (queue.reader < 0) return;
  thread.clock.seen.raise(queue.reader, done);
  if (!reads_only) thread.clock.seen.raise(queue.writer, done);
}

void check_no_stores_pending(const Thread& thread) {
  if (thread.stores.read_waited < thread.stores.issued) {
    fault(kInFlight, "the thread exits while TMA may still read what it stores from the block's shared memory");
  }
}

void end_transfers(const Block& block) {
  for (auto it = transfers.begin(); it != transfers.end();) {
    if (it->thread->block != &block && it->block != &block) {
      ++it;
      continue;
    }
    finding(kInFlight, name_of(block) + " ends before anybody has waited for the TMA load " + at(it->site));
    it = transfers.erase(it);
  }
}

void cancel_transfers() { transfers.clear(); }

}  // namespace emu
