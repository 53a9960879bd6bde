// Host twin of kernels_cu/ptx/acquire_release.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE int ld_acquire_gpu(const int* address) { return static_cast<int>(emu::load_acquire(address)); }
EMU_INLINE void red_release_gpu_add(int* address, int x) { emu::add_release(address, static_cast<unsigned>(x)); }
EMU_INLINE unsigned atom_acq_rel_gpu_inc(unsigned* address, unsigned limit) {
  emu::thread_fence();  // the release; atomics acquire in any case
  return emu::atomic(emu::Atomic::kIncrement, address, limit, 0);
}
