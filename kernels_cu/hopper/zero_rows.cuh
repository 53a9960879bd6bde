// Rows of a tile that are not to be read become zeros, after TMA has brought them: they may hold NaN, and 0 · NaN is NaN.
#pragma once
#include "core/fragment.cuh"
#include "hopper/tile.cuh"
#include "ptx/fence.cuh"

// One warp, for rows [first, first + kRows) of a PanelTile: zeros those for which is_read(row) is false. What follows in
// this warp, or waits for it, may be wgmma.
template <class Tile, int kRows, class IsRead>
__device__ __forceinline__ void zero_unread_rows(unsigned char* tile, int first, const IsRead& is_read) {
  const int lane = Fragment::lane();
#pragma unroll 1
  for (int start = 0; start < kRows; start += kWarpSize) {
    const int row_of_lane = start + lane;
    unsigned unread = __ballot_sync(0xffffffffu, row_of_lane < kRows && !is_read(first + row_of_lane));
    for (; unread != 0; unread &= unread - 1) {
      unsigned char* const row = tile + (first + start + __ffs(unread) - 1) * kPanelRowBytes;
      for (int chunk = lane; chunk < Tile::kPanels * 8; chunk += kWarpSize) {
        *reinterpret_cast<Vector16*>(row + chunk / 8 * Tile::kPanelBytes + chunk % 8 * 16) = Vector16{};
      }
    }
  }
  fence_proxy_async_shared();
  __syncwarp();
}
