#include "shadow.h"

#include <algorithm>

#include "machine.h"

namespace emu {

Access access_by(const Thread& thread, bool write, Site site) {
  return {thread.block, thread.actor, thread.clock.seen[thread.actor], &thread.clock, write, false, false, site};
}

static std::string described(const Access& access) {
  return format("%s by %s %s", access.write ? "write" : "read", access.block->cluster->actors[access.actor].c_str(),
                at(access.site).c_str());
}

// ---- shared memory

void SharedShadow::reset(size_t bytes) {
  chunks_.assign((bytes + kChunk - 1) / kChunk, Chunk{});
  parts_.assign(1, {});
  readers_.assign(1, {});
  free_parts_.clear();
  free_readers_.clear();
}

// An unused entry of `pool`; entry 0 stands for none.
template <class T>
static uint32_t take(std::vector<T>& pool, std::vector<uint32_t>& unused) {
  if (unused.empty()) {
    pool.emplace_back();
    return static_cast<uint32_t>(pool.size()) - 1;
  }
  const uint32_t index = unused.back();
  unused.pop_back();
  return index;
}

SharedShadow::Parts& SharedShadow::split(Chunk& chunk) {
  if (!chunk.parts) {
    chunk.parts = take(parts_, free_parts_);
    for (Cell& part : parts_[chunk.parts]) {
      part = chunk.whole;
      if (!part.more_readers) continue;
      part.more_readers = take(readers_, free_readers_);  // a set of its own
      readers_[part.more_readers] = readers_[chunk.whole.more_readers];
    }
  }
  return parts_[chunk.parts];
}

void SharedShadow::reserve(uint32_t offset, uint32_t bytes) {
  for (uint32_t at = offset; at < offset + bytes; at += kGranule) {
    split(chunks_[at / kChunk])[at % kChunk / kGranule].reserved = true;
  }
}

static bool before(const Access& access, int actor, uint32_t step) {
  return (actor == access.actor && !access.async) || step <= access.clock->seen[actor];
}

void SharedShadow::check_write_before(const Access& access, Cell& cell, uint32_t offset) {
  if (!before(access, cell.writer, cell.write_step)) {
    if (first_time(kRace, access.site, cell.write_site)) {
      finding(kRace, format("shared memory +%u of %s: %s is not ordered after the write by %s %s", offset,
                            name_of(*access.block).c_str(), described(access).c_str(),
                            access.block->cluster->actors[cell.writer].c_str(), at(cell.write_site).c_str()));
    }
  } else if (access.proxy && !cell.written_by_proxy && cell.write_step > access.clock->fenced[cell.writer]) {
    if (first_time(kProxy, access.site, cell.write_site)) {
      finding(kProxy, format("shared memory +%u of %s: %s follows an ordinary write by %s %s without "
                             "fence.proxy.async", offset, name_of(*access.block).c_str(), described(access).c_str(),
                             access.block->cluster->actors[cell.writer].c_str(), at(cell.write_site).c_str()));
    }
  }
}

void SharedShadow::check_reads_before(const Access& access, Cell& cell, uint32_t offset) {
  int unordered = -1;
  if (cell.reader != kNobody && !before(access, cell.reader, cell.read_step)) unordered = cell.reader;
  if (cell.more_readers) {
    Readers& readers = readers_[cell.more_readers];
    for (const auto& [step, actor] : readers) {
      if (!before(access, actor, step)) unordered = actor;
    }
    readers.clear();
    free_readers_.push_back(cell.more_readers);
    cell.more_readers = 0;
  }
  if (unordered >= 0 && first_time(kRace, access.site, cell.read_site)) {
    finding(kRace, format("shared memory +%u of %s: %s is not ordered after a read by %s (the last read %s)", offset,
                          name_of(*access.block).c_str(), described(access).c_str(),
                          access.block->cluster->actors[unordered].c_str(), at(cell.read_site).c_str()));
  }
}

void SharedShadow::note_read(const Access& access, Cell& cell) {
  if (cell.reader != access.actor && cell.reader != kNobody && !before(access, cell.reader, cell.read_step)) {
    if (!cell.more_readers) cell.more_readers = take(readers_, free_readers_);
    Readers& readers = readers_[cell.more_readers];
    bool known = false;
    for (auto& [step, actor] : readers) {
      if (actor == cell.reader) {
        step = cell.read_step;
        known = true;
      }
    }
    if (!known) readers.emplace_back(cell.read_step, cell.reader);
  }
  cell.reader = static_cast<uint16_t>(access.actor);
  cell.read_step = access.step;
  cell.read_site = access.site;
}

void SharedShadow::check_cell(const Access& access, Cell& cell, uint32_t offset) {
  if (cell.reserved) {
    if (first_time(kBarrier, access.site)) {
      finding(kBarrier, format("shared memory +%u of %s holds an mbarrier: %s", offset, name_of(*access.block).c_str(),
                               described(access).c_str()));
    }
    return;
  }
  if (cell.writer != kNobody) {
    check_write_before(access, cell, offset);
  } else if (!access.write && !access.may_be_dropped && first_time(kUninitialised, access.site)) {
    finding(kUninitialised, format("shared memory +%u of %s was never written: %s", offset,
                                   name_of(*access.block).c_str(), described(access).c_str()));
  }
  if (!access.write) {
    note_read(access, cell);
    return;
  }
  check_reads_before(access, cell, offset);
  cell.writer = static_cast<uint16_t>(access.actor);
  cell.write_step = access.step;
  cell.write_site = access.site;
  cell.written_by_proxy = access.proxy;
  cell.reader = kNobody;
}

void SharedShadow::check(const Access& access, uint32_t offset, uint32_t bytes) {
  const uint32_t end = offset + bytes;
  while (offset < end) {
    Chunk& chunk = chunks_[offset / kChunk];
    const uint32_t chunk_end = offset / kChunk * kChunk + kChunk;
    const bool all = offset % kChunk == 0 && end >= chunk_end;
    if (all && !chunk.parts) {
      check_cell(access, chunk.whole, offset);
      offset = chunk_end;
      continue;
    }
    Parts& parts = split(chunk);
    bool reserved = false;
    for (; offset < std::min(end, chunk_end); offset += kGranule) {
      Cell& cell = parts[offset % kChunk / kGranule];
      check_cell(access, cell, offset);
      reserved |= cell.reserved;
    }
    if (all && access.write && !reserved) {  // all parts are alike again
      chunk.whole = parts[0];
      free_parts_.push_back(chunk.parts);
      chunk.parts = 0;
    }
  }
}

// ---- global memory

static bool before(const Access& access, uint32_t block, int actor, uint32_t step) {
  if (block == access.block->cluster->serial) return before(access, actor, step);
  const auto known = access.clock->others.find(block);
  return known != access.clock->others.end() && step <= known->second[actor];
}

void GlobalShadow::check(const Access& access, size_t offset, size_t bytes, size_t size, uint32_t first_serial) {
  if (cells_.empty()) cells_.resize((size + kGranule - 1) / kGranule);
  const auto unordered = [&](const Mark& mark) {  // a mark of an earlier launch is over
    return mark.block >= first_serial && !before(access, mark.block, mark.actor, mark.step);
  };
  const Mark mine{access.block->cluster->serial, access.step, static_cast<uint16_t>(access.actor), access.site};
  for (size_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
    Cell& cell = cells_[i];
    const Mark* conflict = unordered(cell.write) ? &cell.write : nullptr;
    if (access.write && !conflict) {
      conflict = unordered(cell.read) ? &cell.read : unordered(cell.other_read) ? &cell.other_read : nullptr;
    }
    if (conflict && first_time(kRace, access.site, conflict->site)) {
      const std::string who = conflict->block == access.block->cluster->serial ? access.block->cluster->actors[conflict->actor]
                                                                      : std::string("another block");
      finding(kRace, format("global memory, byte %zu of a buffer of %zu: %s in %s is not ordered after the %s by %s %s",
                            i * kGranule, size, described(access).c_str(), name_of(*access.block).c_str(),
                            conflict == &cell.write ? "write" : "read", who.c_str(), at(conflict->site).c_str()));
    }
    if (access.write) {
      cell = Cell{mine, {}, {}};
    } else {
      if (cell.read.block != mine.block || cell.read.actor != mine.actor) cell.other_read = cell.read;
      cell.read = mine;
    }
  }
}

}  // namespace emu
