// Masking: scores a row may not see become −inf, which the softmax turns into exact zeros.
#pragma once
#include "core/fragment.cuh"

// acc_s: scores of rows `row` + 16·m + … and keys `key` + … of one warp; kRowsPerQuery rows in turn are of one query.
// Comparing each row's limit with constant column numbers costs one compare and one select per score.
template <bool kCausal, int kRowsPerQuery = 1, int kMTiles, int kNTiles>
__device__ __forceinline__ void apply_mask(float (&acc_s)[kMTiles][kNTiles][4], int row, int key, int seqlen_k,
                                           int causal_offset) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int keys_seen = seqlen_k;
      if constexpr (kCausal) {
        const int query = (row + 16 * m + Fragment::row(half)) / kRowsPerQuery;
        keys_seen = min(seqlen_k, query + causal_offset + 1);
      }
      const int limit = keys_seen - key - Fragment::column(0, 0);
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          if (8 * j + parity >= limit) acc_s[m][j][2 * half + parity] = -infinity();
        }
      }
    }
  }
}
