// The tensor memory accelerator: one thread starts the copy of a box of a tensor between global and shared memory
// (sm_90). Boxes that reach over the tensor's edge are filled with zeros on the way in and clipped on the way out.
#pragma once

// What cuTensorMapEncodeTiled makes; <cuda.h> cannot be included under NVRTC.
struct alignas(64) CUtensorMap {
  unsigned long long opaque[16];
};

// Loads the box at coordinates (c0, c1, c2, c3), innermost first; its bytes are counted by the mbarrier.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_load(unsigned smem_address, const CUtensorMap* map,
                                                             unsigned mbarrier_smem, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];"
               :: "r"(smem_address), "l"(map), "r"(mbarrier_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_5d_load(unsigned smem_address, const CUtensorMap* map,
                                                             unsigned mbarrier_smem, int c0, int c1, int c2, int c3,
                                                             int c4) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
               :: "r"(smem_address), "l"(map), "r"(mbarrier_smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Loads `bytes` bytes that lie one after the other, a multiple of 16 between addresses that are; no tensor map.
__device__ __forceinline__ void cp_async_bulk_load(unsigned smem_address, const void* gmem, int bytes,
                                                   unsigned mbarrier_smem) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(smem_address), "l"(gmem), "r"(bytes), "r"(mbarrier_smem) : "memory");
}

// Stores the box; belongs to the group this thread commits next.
__device__ __forceinline__ void cp_async_bulk_tensor_4d_store(const CUtensorMap* map, unsigned smem_address,
                                                              int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               :: "l"(map), "r"(smem_address), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_5d_store(const CUtensorMap* map, unsigned smem_address,
                                                              int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               :: "l"(map), "r"(smem_address), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
  static_assert(kPending >= 0, "the number of groups left in flight");
  asm volatile("cp.async.bulk.wait_group %0;" :: "n"(kPending) : "memory");
}

// The same, but only until their shared memory has been read and may be written again.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  static_assert(kPending >= 0, "the number of groups left in flight");
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(kPending) : "memory");
}
