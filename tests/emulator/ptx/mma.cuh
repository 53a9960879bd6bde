// Host twin of kernels_cu/ptx/mma.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  emu::multiply_16x8x16(d, a, b, false);
}
EMU_INLINE void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const unsigned b[2] = {b0, b1};
  emu::multiply_16x8x16(d, a, b, true);
}
