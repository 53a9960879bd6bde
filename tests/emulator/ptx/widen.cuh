// Host twin of kernels_cu/ptx/widen.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE float cvt_f32_f16(unsigned short bits) { return emu::from_fp16(bits); }
