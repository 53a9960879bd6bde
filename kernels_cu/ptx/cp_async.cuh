// cp.async: copies from global to shared memory that run behind the threads that issue them (sm_80).
#pragma once

// Copies 16 bytes past L1; of these, bytes from src_bytes (0 or 16) on are written as zeros and not read.
__device__ __forceinline__ void cp_async_16(unsigned smem_address, const void* gmem, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(smem_address), "l"(gmem), "r"(src_bytes) : "memory");
}

// Closes the group of this thread's copies issued since the last commit; an empty group is allowed.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  static_assert(kPending >= 0, "the number of groups left in flight");
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
}
