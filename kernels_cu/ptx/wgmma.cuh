// wgmma.mma_async: matrix products of a warpgroup (four warps) that run behind the threads that issue them (sm_90a).
// Order: wgmma_fence(), any number of products, wgmma_commit_group(), wgmma_wait_group<>(), then pin_registers() on
// whatever the products read or wrote in registers.
#pragma once
#include "ptx/wgmma_shapes.cuh"

// Makes register writes visible to the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of this warpgroup's latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending <= 7, "the number of groups left in flight");
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving uses of these registers above the wait before it.
template <int kTiles>
__device__ __forceinline__ void pin_registers(float (&x)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+f"(x[i / 4][i % 4]) :: "memory");
}

template <int kTiles>
__device__ __forceinline__ void pin_registers(unsigned (&x)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+r"(x[i / 4][i % 4]) :: "memory");
}
