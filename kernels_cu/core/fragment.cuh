// Which element of a tile each register of an accumulator fragment holds.
#pragma once
#include "core/types.cuh"

// mma.m16n8 accumulators: lane l holds rows l/4 and l/4 + 8, columns 2·(l%4) and the next.
// acc[4·n_tiles]: register r = 4·j + 2·half + parity is row l/4 + 8·half, column 8·j + 2·(l%4) + parity.
struct Fragment {
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
  static __device__ __forceinline__ int row(int half) { return lane() / 4 + 8 * half; }
  static __device__ __forceinline__ int column(int j, int parity) { return 8 * j + lane() % 4 * 2 + parity; }

  // Reductions over the four lanes that share a row.
  static __device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
  static __device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};
