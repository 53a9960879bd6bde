// Shared-memory addresses: the 32-bit form that ldmatrix, cp.async and mbarrier instructions take.
#pragma once

// The kernel's dynamic shared memory. 1024 bytes is the alignment the widest swizzle pattern needs.
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ unsigned cvta_to_shared(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
