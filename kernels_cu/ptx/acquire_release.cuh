// Loads and atomics that order the memory accesses around them, for flags between thread blocks (sm_70).
#pragma once

// What follows in this thread sees what was written before the release that stored the value.
__device__ __forceinline__ int ld_acquire_gpu(const int* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Adds x; whoever acquires the result sees what this thread wrote, or had seen, before.
__device__ __forceinline__ void red_release_gpu_add(int* address, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" :: "l"(address), "r"(x) : "memory");
}

// Adds 1, or goes back to 0 from `limit`, and returns what was there. Both: what this thread had seen goes along, and what
// follows sees what came along with those before.
__device__ __forceinline__ unsigned atom_acq_rel_gpu_inc(unsigned* address, unsigned limit) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(limit) : "memory");
  return old;
}
