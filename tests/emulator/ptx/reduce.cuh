// Host twin of kernels_cu/ptx/reduce.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void red_add_f32(float* address, float x) { emu::add_floats(address, &x, 1); }
EMU_INLINE void red_add_v4_f32(float* address, const float (&x)[4]) { emu::add_floats(address, x, 4); }
