// stmatrix: stores four 8×8 matrices of 16-bit elements from accumulator fragments (sm_90); ldmatrix reversed.
// Lane l gives the address of row l % 8 of matrix l / 8; matrix i comes from r[i].
#pragma once

__device__ __forceinline__ void stmatrix_x4(unsigned smem_address, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(smem_address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// Each matrix is transposed on the way: rows of memory hold columns of the fragments.
__device__ __forceinline__ void stmatrix_x4_trans(unsigned smem_address, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(smem_address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
