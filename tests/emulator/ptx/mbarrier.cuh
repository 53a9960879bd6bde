// Host twin of kernels_cu/ptx/mbarrier.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void mbarrier_init(unsigned mbarrier_smem, int arrivals) { emu::mbarrier_init(mbarrier_smem, arrivals); }
EMU_INLINE void mbarrier_arrive(unsigned mbarrier_smem) { emu::mbarrier_arrive(mbarrier_smem, 0); }
EMU_INLINE void mbarrier_arrive_expect_tx(unsigned mbarrier_smem, int bytes) {
  emu::mbarrier_arrive(mbarrier_smem, bytes);
}
EMU_INLINE bool mbarrier_try_wait_parity(unsigned mbarrier_smem, unsigned parity) {
  return emu::mbarrier_try_wait(mbarrier_smem, parity);
}
// Sleeps instead of polling.
EMU_INLINE void mbarrier_wait(unsigned mbarrier_smem, unsigned parity) { emu::mbarrier_wait(mbarrier_smem, parity); }
