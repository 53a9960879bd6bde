// Host twin of kernels_cu/ptx/acquire_release.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE int ld_acquire_gpu(const int* address) { return static_cast<int>(emu::load_acquire(address)); }
EMU_INLINE void red_release_gpu_add(int* address, int x) { emu::add_release(address, static_cast<unsigned>(x)); }
