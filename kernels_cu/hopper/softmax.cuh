// Online softmax while O is in the hands of the tensor cores: the same mathematics as core/softmax.cuh, but O is
// rescaled later, when the product that is being added to it has finished. One m64 tile of a warpgroup: each warp
// has 16 rows, in the fragment layout of mma.m16n8.
#pragma once
#include "core/softmax.cuh"

struct DeferredSoftmax : OnlineSoftmax<1> {
  float factor[2];  // what the last update divides earlier terms of O by, as a multiplier

  // Turns scores into P = 2^(scale_log2·(s − row_max)), after moving row_max. The maximum moves at once: here a lazy
  // one (kLazyMax) saves nothing, because the multiplications run under the products of the other warpgroup.
  template <int kNTiles>
  __device__ __forceinline__ void update(float (&acc_s)[1][kNTiles][4], float scale_log2) {
    static_assert(kNTiles >= 2, "four chains");
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Four chains: a single one would wait for each maximum, or sum, before the next.
      float chain[4];
#pragma unroll
      for (int i = 0; i < 2 * kNTiles; ++i) {
        const float s = acc_s[0][i / 2][2 * half + i % 2];
        chain[i % 4] = i < 4 ? s : fmaxf(chain[i % 4], s);
      }
      const float tile_max = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
      const float new_max = Fragment::row_max(fmaxf(row_max[0][half], tile_max));
      // A row that has met no key: −inf − −inf would be NaN.
      const float offset = new_max == -infinity() ? 0.0f : new_max * scale_log2;
      factor[half] = ex2_approx(row_max[0][half] * scale_log2 - offset);
      row_max[0][half] = new_max;
#pragma unroll
      for (int i = 0; i < 2 * kNTiles; ++i) {
        float& p = acc_s[0][i / 2][2 * half + i % 2];
        p = ex2_approx(p * scale_log2 - offset);
        chain[i % 4] = i < 4 ? p : chain[i % 4] + p;
      }
      row_sum[0][half] = row_sum[0][half] * factor[half] + ((chain[0] + chain[1]) + (chain[2] + chain[3]));
    }
  }

  template <int kDTiles>
  __device__ __forceinline__ void rescale(float (&acc_o)[kDTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kDTiles * 4; ++i) acc_o[i / 4][i % 4] *= factor[i / 2 % 2];
  }
};
