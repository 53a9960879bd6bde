// Host twin of kernels_cu/ptx/wgmma.cuh.
#pragma once
#include "ptx/wgmma_shapes.cuh"

EMU_INLINE void wgmma_fence() { emu::wgmma_fence(); }
EMU_INLINE void wgmma_commit_group() { emu::wgmma_commit(); }
template <int kPending>
EMU_INLINE void wgmma_wait_group() {
  static_assert(kPending >= 0 && kPending <= 7, "the number of groups left in flight");
  emu::wgmma_wait(kPending);
}

// Registers stay where they are: the products hold their addresses.
template <int kTiles>
EMU_INLINE void pin_registers(float (&)[kTiles][4]) {}
template <int kTiles>
EMU_INLINE void pin_registers(unsigned (&)[kTiles][4]) {}
