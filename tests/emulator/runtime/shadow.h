// Shadow memory: for every two bytes who wrote and who read them last, and when. An access that the vector clocks do
// not order after a conflicting one is a race, whether or not this interleaving showed it.
#pragma once
#include <stdint.h>

#include <array>
#include <utility>
#include <vector>

#include "report.h"

namespace emu {

struct Block;
struct Clock;
struct Thread;

constexpr uint32_t kGranule = 2;  // bytes: two threads may write neighbouring bfloat16
constexpr uint32_t kChunk = 16;   // bytes that most accesses touch together

// One access of one actor, as the checks see it.
struct Access {
  Block* block;
  int actor;
  uint32_t step;       // of the actor
  const Clock* clock;  // what is ordered before it
  bool write;
  bool async;  // not in its thread's order: not even after the actor's own earlier accesses
  bool proxy;  // by TMA or wgmma: sees ordinary writes only through fence.proxy.async
  Site site;
  bool may_be_dropped = false;  // reads of uninitialised memory, which is NaN, show in what is made of them
};

Access access_by(const Thread& thread, bool write, Site site);

class SharedShadow {
 public:
  void reset(size_t bytes);
  void check(const Access& access, uint32_t offset, uint32_t bytes);
  // mbarriers: only mbarrier instructions may touch them.
  void reserve(uint32_t offset, uint32_t bytes);

 private:
  static constexpr uint16_t kNobody = 0xffff;
  struct Cell {
    uint32_t write_step = 0, read_step = 0;
    uint32_t more_readers = 0;  // index into readers_, 0 for none
    uint16_t writer = kNobody, reader = kNobody;
    Site write_site = nullptr, read_site = nullptr;
    bool written_by_proxy = false, reserved = false;
  };
  using Readers = std::vector<std::pair<uint32_t, uint16_t>>;  // step, actor
  // One cell for all 16 bytes as long as every access touches all of them: an eighth of the work.
  struct Chunk {
    Cell whole;
    uint32_t parts = 0;  // index into parts_, 0 if the chunk is whole
  };
  using Parts = std::array<Cell, kChunk / kGranule>;

  void check_write_before(const Access& access, Cell& cell, uint32_t offset);
  void check_reads_before(const Access& access, Cell& cell, uint32_t offset);
  void note_read(const Access& access, Cell& cell);
  void check_cell(const Access& access, Cell& cell, uint32_t offset);
  Parts& split(Chunk& chunk);

  std::vector<Chunk> chunks_;
  std::vector<Parts> parts_;
  std::vector<uint32_t> free_parts_;
  std::vector<Readers> readers_;  // sets, for cells that several unordered actors have read
  std::vector<uint32_t> free_readers_;
};

// The same for one allocation of global memory. Blocks know of each other's accesses only through atomics.
class GlobalShadow {
 public:
  void check(const Access& access, size_t offset, size_t bytes, size_t size, uint32_t first_serial);

 private:
  struct Mark {
    uint32_t block = 0, step = 0;  // block: its serial; 0 for none
    uint16_t actor = 0;
    Site site = nullptr;
  };
  // The last two readers: a write that is ordered after both but not after a third would be missed.
  struct Cell {
    Mark write, read, other_read;
  };
  std::vector<Cell> cells_;  // grown at the first access
};

}  // namespace emu
