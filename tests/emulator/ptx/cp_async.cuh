// Host twin of kernels_cu/ptx/cp_async.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void cp_async_16(unsigned smem_address, const void* gmem, int src_bytes) {
  emu::cp_async(smem_address, gmem, 16, src_bytes);
}
EMU_INLINE void cp_async_commit_group() { emu::cp_async_commit(); }
template <int kPending>
EMU_INLINE void cp_async_wait_group() {
  static_assert(kPending >= 0, "the number of groups left in flight");
  emu::cp_async_wait(kPending);
}
