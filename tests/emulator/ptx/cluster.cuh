// Host twin of kernels_cu/ptx/cluster.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE unsigned cluster_ctarank() { return emu::cluster_rank(); }
EMU_INLINE unsigned mapa(unsigned smem_address, unsigned rank) { return emu::map_shared(smem_address, rank); }
EMU_INLINE void barrier_cluster_arrive_relaxed() { emu::cluster_arrive_relaxed(); }
EMU_INLINE void barrier_cluster_wait() { emu::cluster_wait(); }
EMU_INLINE void mbarrier_arrive_cluster(unsigned mapped_mbarrier) { emu::mbarrier_arrive_mapped(mapped_mbarrier); }
EMU_INLINE void cp_async_bulk_shared(unsigned mapped_address, unsigned smem_address, int bytes,
                                     unsigned mapped_mbarrier) {
  emu::bulk_copy(mapped_address, smem_address, bytes, mapped_mbarrier);
}
