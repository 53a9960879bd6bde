// Which keys the queries of a block see, and which of them one split visits.
#pragma once
#include "core/fragment.cuh"
#include "decode/params.cuh"

// Query i, whose own position is i + diagonal, sees keys [low(i), high(i)).
struct KeyRange {
  int length, diagonal, left, right;

  __device__ __forceinline__ int low(int query) const {
    return Config::kWindow ? max(0, query + diagonal - left) : 0;
  }
  __device__ __forceinline__ int high(int query) const {
    return Config::kCausal ? max(0, min(length, query + diagonal + right + 1)) : length;
  }
};

// Scores of keys that a row does not see become −inf. Rows `row` + 16·m + … of the sequence are kGroup heads by query.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void hide_keys(float (&acc_s)[kMTiles][kNTiles][4], int row, int first_key,
                                          const KeyRange& range) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = (row + 16 * m + Fragment::row(half)) / Config::kGroup;
      const int low = range.low(query) - first_key, high = range.high(query) - first_key;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          const int key = Fragment::column(j, parity);
          if (key < low || key >= high) acc_s[m][j][2 * half + parity] = -infinity();
        }
      }
    }
  }
}
