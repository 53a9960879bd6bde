// Fences between the threads and the units that work beside them (sm_90).
#pragma once

// Makes mbarrier_init visible to TMA and, beyond a barrier, to the other thread blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes this thread's writes to shared memory visible to TMA and wgmma, which read it through another path.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
