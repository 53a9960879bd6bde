#include "deadlock.h"

#include <map>
#include <vector>

#include "launch.h"
#include "machine.h"

namespace emu {

static std::string ranges(const std::vector<int>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t last = i;
    while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
    text += i == last ? format(" %d", sorted[i]) : format(" %d-%d", sorted[i], sorted[last]);
    i = last + 1;
  }
  return text;
}

std::string describe_deadlock() {
  std::string text = "no thread can go on";
  for (const Block* block : resident_blocks()) {
    std::map<std::string, std::vector<int>> groups;
    for (const auto& thread : block->threads) {
      if (thread->state == State::kExited) {
        groups["exited"].push_back(thread->id);
      } else if (thread->wait.what) {
        const Wait& wait = thread->wait;
        std::string what = std::string(wait.what) + " " + at(wait.site);
        if (wait.explain) what += " (" + wait.explain(*block, wait.id) + ")";
        groups[what].push_back(thread->id);
      }
    }
    for (const auto& [what, threads] : groups) {
      text += "\n    " + name_of(*block) + ", threads" + ranges(threads) + ": " + what;
    }
  }
  return text;
}

}  // namespace emu
