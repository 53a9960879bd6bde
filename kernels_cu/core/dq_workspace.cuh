// The float32 workspace in which thread blocks sum dQ: 16×8 accumulator fragments as they lie in registers, so that
// a warp's additions are 512 contiguous bytes.
#pragma once
#include "core/types.cuh"

// Blocks of kBlockM rows follow each other by (batch, head, block); in one, 16-row strips of kHeadDim/8 fragments.
template <int kBlockM, int kHeadDim, bool kVectorReductions>
struct DqWorkspace {
  static constexpr int kFragment = 16 * 8;
  static constexpr int kBlock = kBlockM * kHeadDim;

  // Index in a block of element r of lane `lane` of the fragment at rows 16·row_tile and columns 8·column_tile.
  // Where four floats are added at once a lane's own lie together, otherwise those of the 32 lanes.
  static __device__ __forceinline__ int index(int row_tile, int column_tile, int lane, int r) {
    const int fragment = (row_tile * (kHeadDim / 8) + column_tile) * kFragment;
    return fragment + (kVectorReductions ? lane * 4 + r : r * kWarpSize + lane);
  }
};
