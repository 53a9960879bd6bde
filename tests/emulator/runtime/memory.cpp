#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "launch.h"
#include "machine.h"

namespace emu {

constexpr unsigned char kFill = 0xff;
constexpr size_t kGuard = 4096;  // bytes before and after, filled and looked at

static unsigned char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    perror("emulator: no address space");
    abort();
  }
  return static_cast<unsigned char*>(memory);
}

static bool is_filled(const unsigned char* begin, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    if (begin[i] != kFill) return false;
  }
  return true;
}

// ---- shared memory

constexpr size_t kWindow = 256 << 10;
constexpr size_t kWindows = 16;
static_assert(kMostShared + 2 * kGuard <= kWindow, "a window holds the largest block and its guards");

static unsigned char* windows() {
  static unsigned char* const memory = [] {  // aligned like the windows, as swizzled layouts need
    unsigned char* const pages = map_pages((kWindows + 1) * kWindow);
    return pages + (kWindow - reinterpret_cast<uintptr_t>(pages) % kWindow);
  }();
  return memory;
}

unsigned char* shared_window(int slot) { return windows() + slot * kWindow + kGuard; }

bool in_shared_windows(const void* pointer) {
  return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - windows()) < kWindows * kWindow;
}

void prepare_shared(unsigned char* shared, size_t bytes) { memset(shared - kGuard, kFill, bytes + 2 * kGuard); }

void check_shared_guards(const Block& block) {
  if (!is_filled(block.shared - kGuard, kGuard) || !is_filled(block.shared + block.shared_bytes, kGuard)) {
    finding(kBounds, "bytes just outside the shared memory of " + name_of(block) + " were overwritten");
  }
}

unsigned char* require_shared(const Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, bool write,
                              Site site) {
  const char* const kind = write ? "write" : "read";
  if (address < kSharedBase || address - kSharedBase + static_cast<size_t>(bytes) > block.shared_bytes) {
    fault(kBounds, format("%s of %u bytes at shared memory %+ld of %s, which has %zu bytes, %s", kind, bytes,
                          static_cast<long>(address) - static_cast<long>(kSharedBase), name_of(block).c_str(),
                          block.shared_bytes, at(site).c_str()));
  }
  const uint32_t offset = address - kSharedBase;
  if (offset % alignment) {
    fault(kAlignment, format("%s of %u bytes at shared memory +%u of %s is not aligned to %u, %s", kind, bytes, offset,
                             name_of(block).c_str(), alignment, at(site).c_str()));
  }
  return block.shared + offset;
}

unsigned char* shared_at(const Access& access, uint32_t address, uint32_t bytes, uint32_t alignment) {
  unsigned char* const pointer = require_shared(*access.block, address, bytes, alignment, access.write, access.site);
  if (options.check_races) access.block->shadow.check(access, address - kSharedBase, bytes);
  return pointer;
}

void check_shared_pointer(const void* pointer, uint32_t bytes, bool aligned, bool write, Site site) {
  Thread& thread = *current();
  const long offset = static_cast<const unsigned char*>(pointer) - thread.block->shared;
  const Access access = access_by(thread, write, site);
  const long address = offset + static_cast<long>(kSharedBase);
  shared_at(access, address < 0 ? 0 : static_cast<uint32_t>(address), bytes, aligned ? bytes : 1);
  if (options.count_banks) count_bank_access(thread, static_cast<uint32_t>(offset), bytes, write, site);
}

uint32_t shared_address(const void* pointer) {
  const Block& block = *current()->block;
  const size_t offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset > block.shared_bytes) {
    fault(kBounds, "conversion of a pointer that is not into the block's shared memory " +
                       at(__builtin_return_address(0)));
  }
  return (static_cast<uint32_t>(offset) + kSharedBase) | block.rank << kRankShift;
}

void* shared_access(uint32_t address, int bytes, bool write) {
  Thread& thread = *current();
  const Site site = __builtin_return_address(0);
  address = own_address(*thread.block, address, site);
  void* const pointer = shared_at(access_by(thread, write, site), address, bytes, bytes);
  if (options.count_banks) count_bank_access(thread, address - kSharedBase, bytes, write, site);
  return pointer;
}

// ---- global memory

struct Allocation {
  size_t size;
  GlobalShadow shadow;
};

constexpr size_t kArena = 8ull << 30;      // of address space; only touched pages are memory
constexpr size_t kSpacing = 256 << 10;     // between allocations, so that running far past one meets no other
static std::map<size_t, Allocation> allocations;  // by offset into the arena
static std::map<size_t, Allocation>::iterator last_hit;

static unsigned char* arena() {
  static unsigned char* const memory = map_pages(kArena);
  return memory;
}

static size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

void* allocate_global(size_t bytes) {
  size_t offset = kSpacing;  // the first gap that is large enough
  for (const auto& [start, allocation] : allocations) {
    if (offset + bytes + kSpacing <= start) break;
    offset = round_up(start + allocation.size + kSpacing, 512);
  }
  if (offset + bytes + kSpacing > kArena) return nullptr;
  memset(arena() + offset - kGuard, kFill, bytes + 2 * kGuard);
  last_hit = allocations.emplace(offset, Allocation{bytes, {}}).first;
  return arena() + offset;
}

void free_global(void* pointer) {
  allocations.erase(static_cast<unsigned char*>(pointer) - arena());
  last_hit = allocations.begin();
}

bool in_global_arena(const void* pointer) {
  return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - arena()) < kArena;
}

static bool find_allocation(size_t offset, size_t bytes) {
  const auto contains = [&](auto it) {
    return it != allocations.end() && offset >= it->first && offset + bytes <= it->first + it->second.size;
  };
  if (allocations.empty()) return false;
  if (contains(last_hit)) return true;
  auto it = allocations.upper_bound(offset);
  if (it == allocations.begin()) return false;
  if (!contains(--it)) return false;
  last_hit = it;
  return true;
}

static std::string nearest_allocation(size_t offset) {
  auto it = allocations.upper_bound(offset);
  if (it != allocations.begin()) {
    const auto& [start, allocation] = *std::prev(it);
    return format("byte %zu of a buffer of %zu", offset - start, allocation.size);
  }
  if (it == allocations.end()) return "no buffer exists";
  return format("%zu bytes before a buffer of %zu", it->first - offset, it->second.size);
}

void require_global(const void* pointer, size_t bytes, bool aligned, bool write, Site site) {
  const size_t offset = static_cast<const unsigned char*>(pointer) - arena();
  const char* const kind = write ? "write" : "read";
  if (!in_global_arena(pointer) || !find_allocation(offset, bytes)) {
    const std::string where = in_global_arena(pointer) ? nearest_allocation(offset) : "not global memory at all";
    fault(kBounds, format("%s of %zu bytes of global memory outside every buffer (%s), %s", kind, bytes, where.c_str(),
                          at(site).c_str()));
  }
  if (aligned && offset % bytes) {
    fault(kAlignment, format("%s of %zu bytes of global memory at byte %zu of a buffer is not aligned, %s", kind,
                             bytes, offset - last_hit->first, at(site).c_str()));
  }
}

void check_global(const Access& access, const void* pointer, size_t bytes, bool aligned) {
  require_global(pointer, bytes, aligned, access.write, access.site);
  if (options.check_races) {
    auto& [start, allocation] = *last_hit;
    const size_t offset = static_cast<const unsigned char*>(pointer) - arena() - start;
    allocation.shadow.check(access, offset, bytes, allocation.size, first_serial_of_launch());
  }
}

void check_global_guards() {
  for (const auto& [start, allocation] : allocations) {
    const unsigned char* const begin = arena() + start;
    if (!is_filled(begin - kGuard, kGuard) || !is_filled(begin + allocation.size, kGuard)) {
      finding(kBounds, format("bytes just outside a global buffer of %zu bytes were overwritten", allocation.size));
    }
  }
}

}  // namespace emu
