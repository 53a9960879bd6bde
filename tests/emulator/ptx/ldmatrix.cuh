// Host twin of kernels_cu/ptx/ldmatrix.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void ldmatrix_x4(unsigned (&r)[4], unsigned smem_address) { emu::load_matrices(r, 4, false, smem_address); }
EMU_INLINE void ldmatrix_x4_trans(unsigned (&r)[4], unsigned smem_address) {
  emu::load_matrices(r, 4, true, smem_address);
}
