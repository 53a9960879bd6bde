#include "banks.h"

#include <algorithm>

#include "machine.h"

namespace emu {

constexpr int kBanks = 32;
constexpr uint32_t kWavefrontBytes = 128;

struct Count {
  bool write = false;
  uint64_t requests = 0, wavefronts = 0, extra = 0;
};
static std::map<Site, Count> counts;

// Wavefronts of lanes [first, last): the most distinct words any bank is asked for.
static uint32_t wavefronts(const BankRequest& request, int first, int last) {
  std::vector<uint32_t> words[kBanks];
  uint32_t most = 0;
  for (int lane = first; lane < last; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    for (uint32_t word = request.offsets[lane] / 4; word <= (request.offsets[lane] + request.bytes - 1) / 4; ++word) {
      std::vector<uint32_t>& bank = words[word % kBanks];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      most = std::max<uint32_t>(most, bank.size());
    }
  }
  return most;
}

static void count(const BankRequest& request) {
  const int group = std::min<int>(32, kWavefrontBytes / request.bytes);  // lanes served together
  Count& total = counts[request.site];
  total.write = request.write;
  ++total.requests;
  for (int first = 0; first < 32; first += group) {
    const uint32_t needed = wavefronts(request, first, std::min(first + group, 32));
    total.wavefronts += needed;
    if (needed > 1) total.extra += needed - 1;
  }
}

void count_bank_access(Thread& thread, uint32_t offset, uint32_t bytes, bool write, Site site) {
  BankRequests& requests = warp_of(thread).bank_requests;
  BankCounters& counters = thread.bank_counters;
  if (counters.epoch != requests.epoch) {
    counters.epoch = requests.epoch;
    counters.executions.clear();
  }
  const uint32_t execution = counters.executions[site]++;
  std::vector<BankRequest>& open = requests.open[site];
  if (open.size() <= execution) open.resize(execution + 1, BankRequest{site, write, bytes, 0, {}});
  open[execution].lanes |= 1u << thread.lane;
  open[execution].offsets[thread.lane] = offset;
}

void count_matrix_rows(const uint32_t (&offsets)[8], bool write, Site site) {
  BankRequest request{site, write, 16, 0xff, {}};
  std::copy(offsets, offsets + 8, request.offsets);
  count(request);
}

void flush_banks(BankRequests& requests) {
  if (requests.open.empty()) return;
  for (const auto& [site, open] : requests.open) {
    for (const BankRequest& request : open) count(request);
  }
  requests.open.clear();
  ++requests.epoch;
}

void clear_bank_counts() { counts.clear(); }

std::string bank_counts() {
  std::string text;
  for (const auto& [site, total] : counts) {
    text += format("<%p> %d %llu %llu %llu\n", site, total.write, static_cast<unsigned long long>(total.requests),
                   static_cast<unsigned long long>(total.wavefronts), static_cast<unsigned long long>(total.extra));
  }
  return text;
}

}  // namespace emu
