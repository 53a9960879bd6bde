// A operands of a warpgroup's products on their way to another warpgroup that has the same fragments, by way of shared
// memory: thread t reads what thread t wrote.
#pragma once
#include "core/types.cuh"

template <int kKTiles>
struct OperandFragments {
  static constexpr int kThreads = 4 * kWarpSize;
  static constexpr int kBytes = kKTiles * kThreads * sizeof(Vector16);

  static __device__ __forceinline__ void store(unsigned char* fragments, const unsigned (&reg)[kKTiles][4]) {
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) store(fragments, reg[k], k);
  }

  // One of them.
  static __device__ __forceinline__ void store(unsigned char* fragments, const unsigned (&reg)[4], int k) {
    Vector16 vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) vector.words[i] = reg[i];
    own(fragments)[k * kThreads] = vector;
  }

  static __device__ __forceinline__ void load(unsigned (&reg)[kKTiles][4], unsigned char* fragments) {
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) {
      const Vector16 vector = own(fragments)[k * kThreads];
#pragma unroll
      for (int i = 0; i < 4; ++i) reg[k][i] = vector.words[i];
    }
  }

 private:
  // Neighbouring threads have neighbouring vectors: no bank conflicts.
  static __device__ __forceinline__ Vector16* own(unsigned char* fragments) {
    return reinterpret_cast<Vector16*>(fragments) + threadIdx.x % kThreads;
  }
};
