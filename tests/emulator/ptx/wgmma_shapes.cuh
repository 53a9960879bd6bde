// Host twin of kernels_cu/ptx/wgmma_shapes.cuh, for any N.
#pragma once
#include "cuda_on_cpu.h"

template <int kTransA, int kTransB, int kTiles>
EMU_INLINE void emu_wgmma_ss(bool bf16, float (&d)[kTiles][4], unsigned long long a, unsigned long long b,
                             int accumulate) {
  static_assert(kTiles >= 1 && kTiles <= 32, "N is a multiple of 8 up to 256");
  emu::wgmma({d[0], 8 * kTiles, nullptr, a, b, kTransA != 0, kTransB != 0, bf16, accumulate != 0});
}
template <int kTransA, int kTransB, int kTiles>
EMU_INLINE void wgmma_m64k16_f16_ss(float (&d)[kTiles][4], unsigned long long a, unsigned long long b,
                                    int accumulate) {
  emu_wgmma_ss<kTransA, kTransB>(false, d, a, b, accumulate);
}
template <int kTransA, int kTransB, int kTiles>
EMU_INLINE void wgmma_m64k16_bf16_ss(float (&d)[kTiles][4], unsigned long long a, unsigned long long b,
                                    int accumulate) {
  emu_wgmma_ss<kTransA, kTransB>(true, d, a, b, accumulate);
}

template <int kTransB, int kTiles>
EMU_INLINE void emu_wgmma_rs(bool bf16, float (&d)[kTiles][4], const unsigned (&a)[4], unsigned long long b,
                             int accumulate) {
  static_assert(kTiles >= 1 && kTiles <= 32, "N is a multiple of 8 up to 256");
  emu::wgmma({d[0], 8 * kTiles, a, 0, b, false, kTransB != 0, bf16, accumulate != 0});
}
template <int kTransB, int kTiles>
EMU_INLINE void wgmma_m64k16_f16_rs(float (&d)[kTiles][4], const unsigned (&a)[4], unsigned long long b,
                                    int accumulate) {
  emu_wgmma_rs<kTransB>(false, d, a, b, accumulate);
}
template <int kTransB, int kTiles>
EMU_INLINE void wgmma_m64k16_bf16_rs(float (&d)[kTiles][4], const unsigned (&a)[4], unsigned long long b,
                                    int accumulate) {
  emu_wgmma_rs<kTransB>(true, d, a, b, accumulate);
}
