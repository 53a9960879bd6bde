// ldmatrix: loads four 8×8 matrices of 16-bit elements as mma.sync fragments (sm_75).
// Lane l gives the address of row l % 8 of matrix l / 8; matrix i arrives in r[i].
#pragma once

__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned smem_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address) : "memory");
}

// Each matrix is transposed on the way: a row-major V tile becomes a column operand.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned smem_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address) : "memory");
}
