// Turns: warps of different thread blocks pass one after the other, in the order of their numbers.
#pragma once
#include "core/types.cuh"
#include "ptx/acquire_release.cuh"

// The whole warp waits until the warps before it have passed. Those must be running or done: give lower turns to
// blocks of lower index, which start first.
__device__ __forceinline__ void wait_for_turn(const int* turn, int mine) {
  if (threadIdx.x % kWarpSize == 0) {
    while (ld_acquire_gpu(turn) != mine) {
    }
  }
  __syncwarp();
}

// What the warp wrote before, the next one sees.
__device__ __forceinline__ void pass_turn(int* turn) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) red_release_gpu_add(turn, 1);
}
