#include "scheduler.h"

#include <stdlib.h>

#include "deadlock.h"

namespace emu {

ThreadView* running;

static constexpr long kMostIdlePolls = 200000;
static constexpr uint32_t kEngineStepEvery = 64;  // switches, on average

static std::vector<Thread*> ready;
static Fibre main_fibre;
static uint64_t random_state;
static long idle_polls;  // since something last changed
static bool on_main_stack = true;

static uint64_t next_random() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

uint32_t random_below(uint32_t bound) { return static_cast<uint32_t>((next_random() >> 32) * bound >> 32); }

void make_ready(Thread& thread) {
  idle_polls = 0;
  thread.state = State::kReady;
  ready.push_back(&thread);
}

static bool step_engine() {
  ThreadView* const thread = running;
  running = nullptr;  // what TMA does is not the doing of the thread that happens to make way for it
  const bool moved = step_transfers();
  running = thread;
  if (moved) idle_polls = 0;
  return moved;
}

// The next thread, taken off the queue; null if none can run and TMA has nothing to move.
static Thread* pick() {
  if (random_below(kEngineStepEvery) == 0) step_engine();
  while (ready.empty()) {
    if (!step_engine()) return nullptr;
  }
  Thread*& chosen = ready[random_below(static_cast<uint32_t>(ready.size()))];
  Thread* const thread = chosen;
  chosen = ready.back();
  ready.pop_back();
  return thread;
}

static void switch_from(Fibre& from) {
  Thread* const next = pick();
  running = next;
  Fibre& to = next ? next->fibre : main_fibre;
  if (&to != &from) switch_fibre(from, to);
}

void park(const Wait& wait) {
  Thread& thread = *current();
  thread.state = State::kWaiting;
  thread.wait = wait;
  switch_from(thread.fibre);
}

void yield() {
  Thread& thread = *current();
  ready.push_back(&thread);
  switch_from(thread.fibre);
}

void poll(const Wait& wait) {
  Thread& thread = *current();
  thread.wait = wait;
  thread.state = State::kPolling;
  if (++idle_polls > kMostIdlePolls) {
    running = nullptr;
    fault(kDeadlock, describe_deadlock());
  }
  yield();
  thread.state = State::kReady;
}

bool run_threads() {
  Thread* const next = pick();
  if (!next) return false;
  running = next;
  on_main_stack = false;
  switch_fibre(main_fibre, next->fibre);
  on_main_stack = true;
  running = nullptr;
  return true;
}

void exit_thread() {
  Thread& thread = *current();
  thread.state = State::kExited;
  if (--thread.block->live == 0) {
    running = nullptr;  // the launch may have a new block to start
    switch_fibre(thread.fibre, main_fibre);
  }
  switch_from(thread.fibre);
  abort();
}

void abandon_launch() {
  running = nullptr;
  if (on_main_stack) throw LaunchAbandoned{};
  Fibre abandoned;
  switch_fibre(abandoned, main_fibre);
  abort();
}

void reset_scheduler(uint64_t seed) {
  ready.clear();
  random_state = 0x9E3779B97F4A7C15ull * (seed + 1) | 1;
  for (int i = 0; i < 8; ++i) next_random();
  idle_polls = 0;
}

}  // namespace emu
