// dK or dV on its way out: a warpgroup's 64 rows, through shared memory, by TMA.
#pragma once
#include "core/fragment.cuh"
#include "hopper/tile.cuh"
#include "ptx/barrier.cuh"
#include "ptx/fence.cuh"
#include "ptx/stmatrix.cuh"

// Stages a warpgroup's rows, times factor, in panels of 64 columns that are kPanelStride bytes apart, and starts their
// store to rows `row` … of the head of a KeyBlock. Thread 0 of the warpgroup must wait for its bulk groups before the panels
// are written again, and before it exits. Keys of packed sequences that no query sees get zeros: sums of 0 times what others
// see may be NaN.
template <class Element, int kPanelStride, int kTiles, class KeyBlock>
__device__ __forceinline__ void store_gradient(const float (&acc)[kTiles][4], float factor, unsigned panels_smem,
                                               int barrier, const CUtensorMap* map, int row, const KeyBlock& keys) {
  using Panel = PanelTile<64, kPanelColumns>;
  constexpr int kThreads = 4 * kWarpSize;
  const int lane = Fragment::lane();
  const int tile_row = threadIdx.x / kWarpSize % 4 * 16;
#pragma unroll
  for (int d = 0; d < kTiles; d += 2) {
    unsigned reg[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = acc[d + i / 2];
      reg[i] = Element::pack(x[i % 2 * 2] * factor, x[i % 2 * 2 + 1] * factor);
      if constexpr (Config::kVarlen) {
        if (row + tile_row + Fragment::row(i % 2) >= keys.seen_keys) reg[i] = 0;
      }
    }
    stmatrix_x4(panels_smem + d / 8 * kPanelStride + Panel::offset(tile_row + lane % 16, d % 8 + lane / 16), reg);
  }
  fence_proxy_async_shared();
  bar_sync(barrier, kThreads);
  if (threadIdx.x % kThreads == 0) {
#pragma unroll
    for (int panel = 0; panel < ceil_div(kTiles, 8); ++panel) {
      const unsigned panel_smem = panels_smem + panel * kPanelStride;
      const int column = panel * kPanelColumns;
      if constexpr (Config::kVarlen) {
        const PackedRows at(keys.key_row, keys.key_rows, row);
        cp_async_bulk_tensor_5d_store(map, panel_smem, column, at.row, keys.head, at.end, PackedRows::kOrigin);
      } else {
        cp_async_bulk_tensor_4d_store(map, panel_smem, column, row, keys.head, keys.batch);
      }
    }
    cp_async_bulk_commit_group();
  }
}
