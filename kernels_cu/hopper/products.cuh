// The k16 steps of attention's products on one warpgroup, by element type. They run behind the threads: ptx/wgmma.cuh.
#pragma once
#include "core/types.cuh"
#include "ptx/wgmma.cuh"

// d = a bᵀ + (accumulate ? d : 0), both in shared memory with k inside.
template <int kNTiles>
__device__ __forceinline__ void wgmma_k_major(bf16, float (&d)[kNTiles][4], unsigned long long a, unsigned long long b,
                                              bool accumulate) {
  wgmma_m64k16_bf16_ss<0, 0>(d, a, b, accumulate);
}
template <int kNTiles>
__device__ __forceinline__ void wgmma_k_major(fp16, float (&d)[kNTiles][4], unsigned long long a, unsigned long long b,
                                              bool accumulate) {
  wgmma_m64k16_f16_ss<0, 0>(d, a, b, accumulate);
}

// d += a b, a in registers and b in shared memory with k outside.
template <int kNTiles>
__device__ __forceinline__ void wgmma_n_major(bf16, float (&d)[kNTiles][4], const unsigned (&a)[4],
                                              unsigned long long b) {
  wgmma_m64k16_bf16_rs<1>(d, a, b, true);
}
template <int kNTiles>
__device__ __forceinline__ void wgmma_n_major(fp16, float (&d)[kNTiles][4], const unsigned (&a)[4],
                                              unsigned long long b) {
  wgmma_m64k16_f16_rs<1>(d, a, b, true);
}

// d = a b + (accumulate ? d : 0), both in shared memory, a with k inside and b with k outside.
template <int kNTiles>
__device__ __forceinline__ void wgmma_k_n_major(bf16, float (&d)[kNTiles][4], unsigned long long a,
                                                unsigned long long b, bool accumulate) {
  wgmma_m64k16_bf16_ss<0, 1>(d, a, b, accumulate);
}
template <int kNTiles>
__device__ __forceinline__ void wgmma_k_n_major(fp16, float (&d)[kNTiles][4], unsigned long long a,
                                                unsigned long long b, bool accumulate) {
  wgmma_m64k16_f16_ss<0, 1>(d, a, b, accumulate);
}
