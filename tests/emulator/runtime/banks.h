// Shared-memory bank conflicts. A warp's access takes one wavefront for each group of lanes that moves 128 bytes,
// and one more for every further word that some bank must deliver.
#pragma once
#include <stdint.h>

#include <map>
#include <string>
#include <vector>

#include "report.h"

namespace emu {

struct Thread;

// What the lanes of a warp did at one place. They run apart here, so accesses are put together again: a lane's n-th
// execution of an instruction, since the warp last met, belongs to the other lanes' n-th.
struct BankRequest {
  Site site;
  bool write;
  uint32_t bytes;  // per lane
  uint32_t lanes = 0;
  uint32_t offsets[32];
};

struct BankRequests {
  uint32_t epoch = 1;  // raised when the warp meets
  std::map<Site, std::vector<BankRequest>> open;
};

struct BankCounters {
  uint32_t epoch = 0;
  std::map<Site, uint32_t> executions;
};

void count_bank_access(Thread& thread, uint32_t offset, uint32_t bytes, bool write, Site site);
// All lanes at once: eight rows of 16 bytes, as ldmatrix and stmatrix take them.
void count_matrix_rows(const uint32_t (&offsets)[8], bool write, Site site);
void flush_banks(BankRequests& requests);

void clear_bank_counts();
std::string bank_counts();  // "site write requests wavefronts extra" lines

}  // namespace emu
