// Hints to the caches.
#pragma once

// The line of global memory at `address` is brought to L2; nobody waits for it.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" :: "l"(address));
}
