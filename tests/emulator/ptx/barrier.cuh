// Host twin of kernels_cu/ptx/barrier.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void bar_sync(int barrier, int threads) { emu::barrier_sync(barrier, threads); }
EMU_INLINE void bar_arrive(int barrier, int threads) { emu::barrier_arrive(barrier, threads); }
