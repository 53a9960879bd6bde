// mbarrier: a barrier in shared memory (8 bytes) that counts arrivals of threads and bytes written by TMA (sm_90).
// Its phase completes when both counts are met; it can then be used again, with the other parity.
#pragma once

__device__ __forceinline__ void mbarrier_init(unsigned mbarrier_smem, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(mbarrier_smem), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned mbarrier_smem) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" :: "r"(mbarrier_smem) : "memory");
}

// Arrives, and lets the phase wait for `bytes` more bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned mbarrier_smem, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
               :: "r"(mbarrier_smem), "r"(bytes) : "memory");
}

// Whether the phase of this parity has completed; may sleep for a while before it says no.
__device__ __forceinline__ bool mbarrier_try_wait_parity(unsigned mbarrier_smem, unsigned parity) {
  unsigned completed;
  asm volatile("{.reg .pred p;\n"
               "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;}"
               : "=r"(completed) : "r"(mbarrier_smem), "r"(parity) : "memory");
  return completed;
}

// The one polling loop: returns once the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(unsigned mbarrier_smem, unsigned parity) {
  while (!mbarrier_try_wait_parity(mbarrier_smem, parity)) {
  }
}
