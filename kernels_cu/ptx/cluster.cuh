// Clusters: thread blocks that run at the same time and reach each other's shared memory (sm_90). A kernel states their
// number by __cluster_dims__. The shared-memory address of one thread block means another's after mapa.
#pragma once

// The thread block's number in its cluster.
__device__ __forceinline__ unsigned cluster_ctarank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Where thread block `rank` of the cluster has what this one has at the address.
__device__ __forceinline__ unsigned mapa(unsigned smem_address, unsigned rank) {
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(smem_address), "r"(rank));
  return mapped;
}

// A barrier of all threads of the cluster, in two halves. The first orders no memory but what a fence before it does,
// fence_mbarrier_init() for one: releasing everything would cost a MEMBAR of the whole GPU.
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at an mbarrier of another thread block; the address is mapa's. It says that this thread has read what is to be
// written again, no more: releasing ordinary writes to the cluster would cost two MEMBARs, this form costs none (SASS
// of CUDA 12.9 and 13.0) and, unlike a relaxed one, stays behind what precedes it.
__device__ __forceinline__ void mbarrier_arrive_cluster(unsigned mapped_mbarrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cluster.b64 _, [%0];" :: "r"(mapped_mbarrier) : "memory");
}

// Copies `bytes` bytes, a multiple of 16 between addresses that are, to the shared memory of another thread block, whose
// mbarrier counts them; its addresses are mapa's. The copy is as TMA's: fence_proxy_async_shared() after writes to the
// source.
__device__ __forceinline__ void cp_async_bulk_shared(unsigned mapped_address, unsigned smem_address, int bytes,
                                                     unsigned mapped_mbarrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(mapped_address), "r"(smem_address), "r"(bytes), "r"(mapped_mbarrier) : "memory");
}
