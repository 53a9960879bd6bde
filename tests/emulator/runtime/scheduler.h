// Who runs next: a random one of the threads that can, so that every seed is another interleaving.
#pragma once
#include <stdint.h>

#include "machine.h"

namespace emu {

uint32_t random_below(uint32_t bound);

void make_ready(Thread& thread);

// Stops the running thread until make_ready. Other threads run meanwhile.
void park(const Wait& wait);

// Lets others run; the running thread stays ready.
void yield();

// A thread that keeps asking for something calls this between two looks. When nothing but polling has happened for
// long, that is a deadlock.
void poll(const Wait& wait);

// From the main context: runs threads until a block has finished, a fault happens or nobody can run.
// Returns false in the last case.
bool run_threads();

// Ends the running thread.
[[noreturn]] void exit_thread();

// Back to the main context for good; the launch's threads are never continued. Thrown where an engine that found a
// fault was stepped by the main context itself.
struct LaunchAbandoned {};
[[noreturn]] void abandon_launch();

void reset_scheduler(uint64_t seed);

}  // namespace emu
