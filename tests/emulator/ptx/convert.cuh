// Host twin of kernels_cu/ptx/convert.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE unsigned cvt_rn_f16x2(float lo, float hi) { return emu::to_fp16(lo) | (unsigned)emu::to_fp16(hi) << 16; }
EMU_INLINE unsigned cvt_rn_bf16x2(float lo, float hi) { return emu::to_bf16(lo) | (unsigned)emu::to_bf16(hi) << 16; }
EMU_INLINE float ex2_approx(float x) { return emu::exp2_approx_ftz(x); }
EMU_INLINE float lg2_approx(float x) { return emu::log2_approx_ftz(x); }
EMU_INLINE float rcp_approx(float x) { return 1.0f / x; }
