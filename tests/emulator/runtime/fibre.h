// Fibres: one for each CUDA thread, on one OS thread. A switch saves the six registers a callee must keep: 5 ns,
// where swapcontext makes a system call.
#pragma once
#include <stddef.h>

namespace emu {

struct Fibre {
  void* stack_pointer = nullptr;
};

// Readies `fibre` to run `body`, which must not return, on stack `index` of the pool.
void start_fibre(Fibre& fibre, int index, void (*body)());

// Continues `to`; returns when something switches back to `from`.
void switch_fibre(Fibre& from, Fibre& to);

}  // namespace emu
