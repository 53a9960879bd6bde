#include "report.h"

#include <stdarg.h>
#include <stdio.h>

#include <set>
#include <tuple>
#include <vector>

#include "machine.h"
#include "scheduler.h"

namespace emu {

static constexpr size_t kMostFindings = 40;  // more would hide the first ones
static std::vector<std::string> findings;
static std::set<std::tuple<std::string, Site, Site>> reported;
static bool faulted;
static std::string joined;

std::string format(const char* pattern, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

std::string at(Site site) { return format("at <%p>", site); }

void finding(const char* check, const std::string& message) {
  if (findings.size() < kMostFindings) findings.push_back(std::string(check) + "\t" + message);
}

void fault(const char* check, const std::string& message) {
  finding(check, current() ? name_of(*current()) + ": " + message : message);
  faulted = true;
  abandon_launch();
}

bool first_time(const char* check, Site first, Site second) {
  return reported.emplace(check, first, second).second;
}

bool any_fault() { return faulted; }

void clear_findings() {
  findings.clear();
  reported.clear();
  faulted = false;
}

const char* findings_text() {
  joined.clear();
  for (const std::string& text : findings) joined += (joined.empty() ? "" : "\x1e") + text;
  return joined.c_str();
}

}  // namespace emu
