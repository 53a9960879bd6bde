// Findings: what a check says, under the check's name. A finding lets the launch go on; a fault ends it.
#pragma once
#include <stdint.h>

#include <string>

namespace emu {

using Site = const void*;  // where in the kernel: a return address, turned into file and line by the Python side

// Names of the checks, the same on the Python side.
constexpr char kRace[] = "race";
constexpr char kProxy[] = "proxy";
constexpr char kBounds[] = "bounds";
constexpr char kAlignment[] = "alignment";
constexpr char kUninitialised[] = "uninitialised";
constexpr char kDeadlock[] = "deadlock";
constexpr char kCollective[] = "collective";
constexpr char kDivergence[] = "divergence";  // two places, none if the Python side sees that they are one line
constexpr char kBarrier[] = "barrier";
constexpr char kInFlight[] = "in flight";
constexpr char kTrap[] = "trap";
constexpr char kLaunch[] = "launch";

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string at(Site site);  // "at <site>", for messages

void finding(const char* check, const std::string& message);
[[noreturn]] void fault(const char* check, const std::string& message);

// False from the second time on: one report for each pair of lines, however many threads and bytes meet there.
bool first_time(const char* check, Site first, Site second = nullptr);

bool any_fault();
void clear_findings();
const char* findings_text();  // "check\tmessage" records, separated by '\x1e'

}  // namespace emu
