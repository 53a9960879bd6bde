// Elements of operands whose dtype is not known at compile time: one for each sequence or head, so nothing is lost.
#pragma once
#include "core/widen.cuh"

// Element `index` of an array of floats of 4 bytes, or of Element.
template <class Element>
__device__ __forceinline__ float read_float(const void* array, long long index, int bytes) {
  if (bytes == 4) return static_cast<const float*>(array)[index];
  return widen<Element>(static_cast<const Element*>(array)[index].bits).lo;
}

// The length `index` of an array of integers of 4 or 8 bytes, at least 0 and at most `limit`.
__device__ __forceinline__ int read_length(const void* array, long long index, int bytes, int limit) {
  const long long length =
      bytes == 4 ? static_cast<const int*>(array)[index] : static_cast<const long long*>(array)[index];
  return static_cast<int>(max(0ll, min(length, static_cast<long long>(limit))));
}

// Queries of one batch element that are no padding; the kernel's are params.seqlen_q from `first_query` on.
template <class Params>
__device__ __forceinline__ int real_queries(const Params& params, int batch, int first_query) {
  if constexpr (Config::kQueryPadding) {
    const int queries = read_length(params.query_padding, batch * params.query_padding_stride,
                                    params.query_padding_bytes, first_query + params.seqlen_q);
    return max(0, queries - first_query);
  } else {
    return params.seqlen_q;
  }
}
