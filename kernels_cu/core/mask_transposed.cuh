// Masking of transposed tiles, where a fragment's rows are keys and its columns queries.
#pragma once
#include "core/fragment.cuh"

// p: probabilities of keys `key` + 16·m + … and queries `query` + … of one warp. Those a query may not see become
// exact zeros whatever they were: the exponential of a hidden score may have overflowed.
template <bool kCausal, int kMTiles, int kNTiles>
__device__ __forceinline__ void zero_hidden(float (&p)[kMTiles][kNTiles][4], int key, int query, int seqlen_k,
                                            int causal_offset) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int this_key = key + 16 * m + Fragment::row(half);
      // Columns before this one are hidden from this key.
      int limit = kCausal ? this_key - causal_offset - query - Fragment::column(0, 0) : 0;
      if (this_key >= seqlen_k) limit = 8 * kNTiles;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          if (8 * j + parity < limit) p[m][j][2 * half + parity] = 0.0f;
        }
      }
    }
  }
}
