// Which rows of a visited tile are loaded: those that nobody sees become zeros, for their NaN would show, 0 · NaN.
// core/visible.cuh bounds the rest. Objects, not lambdas: those would change a plain kernel's code by what they capture.
#pragma once
#include "core/modifier_params.cuh"
#include "core/types.cuh"

// Of a tile of K or V whose first key is `first`, for `heads` query heads from `head` on.
template <class Params>
struct KeyIsRead {
  const Params& params;
  int batch, head, heads, first;

  __device__ __forceinline__ bool operator()(int row) const {
    if constexpr (Config::kWindow) {
      if (first + row < params.first_key) return false;
    }
    if constexpr (kMasks) {
      const HeadStrides& s = params.keys_seen_strides;
      bool seen = false;
      for (int i = 0; i < heads; ++i) seen |= params.keys_seen[batch * s.batch + (head + i) * s.head + first + row] != 0;
      return seen;
    } else {
      return true;
    }
  }
};

template <class Params>
__device__ __forceinline__ KeyIsRead<Params> keys_read(const Params& params, int batch, int head, int heads, int first) {
  return {params, batch, head, heads, first};
}

// A visited query may see no key: what hides keys one by one may hide all, and dropout's kernels start before the first
// query that sees one.
constexpr bool kHasBlindRows = Config::kDropout || Config::kWindow || kMasks || Config::kBias || Config::kKeyPadding ||
                               Config::kScoreMod;

// Of a tile of Q or dO, its rows' lse in base 2 from `lse_log2` on: +inf where a row sees no key.
struct QueryIsRead {
  const float* lse_log2;

  __device__ __forceinline__ bool operator()(int row) const {
    if constexpr (kHasBlindRows) return lse_log2[row] != infinity();
    else return true;
  }
};
