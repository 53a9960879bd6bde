// Lengths of padded batch elements, which are operands on the device.
#pragma once
#include "core/read_value.cuh"

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
