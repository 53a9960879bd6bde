// Host twin of kernels_cu/ptx/stmatrix.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void stmatrix_x4(unsigned smem_address, const unsigned (&r)[4]) {
  emu::store_matrices(r, 4, false, smem_address);
}
EMU_INLINE void stmatrix_x4_trans(unsigned smem_address, const unsigned (&r)[4]) {
  emu::store_matrices(r, 4, true, smem_address);
}
