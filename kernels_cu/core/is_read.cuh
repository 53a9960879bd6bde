// Which rows of a visited tile are loaded: those that nobody sees become zeros, for their NaN would show, 0 · NaN.
// core/visible.cuh bounds the rest. Objects, not lambdas: those would change a plain kernel's code by what they capture.
#pragma once
#include "core/modifier_params.cuh"

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

// Of a tile of Q or dO whose first query is `first`. Only with dropout, and in packed sequences, does a kernel start before
// the first query that sees a key.
template <class Params>
struct QueryIsRead {
  const Params& params;
  int first;

  __device__ __forceinline__ bool operator()(int row) const {
    if constexpr (Config::kDropout || Config::kVarlen) return first + row >= params.blind_rows;
    else return true;
  }
};

template <class Params>
__device__ __forceinline__ QueryIsRead<Params> queries_read(const Params& params, int first) {
  return {params, first};
}
