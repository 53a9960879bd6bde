// Which key tiles a block of query rows visits, and which of those need a mask.
#pragma once
#include "core/types.cuh"

// Tiles [0, full_end) are visible to every row; tiles [full_end, end) are masked in part; the rest is never touched.
struct TileRange {
  int full_end;
  int end;
};

// Row i of [row_begin, row_end) sees keys j < seqlen_k and, if kCausal, j <= i + causal_offset.
template <int kBlockN, bool kCausal>
__device__ __forceinline__ TileRange key_tiles(int row_begin, int row_end, int seqlen_k, int causal_offset) {
  int seen_by_all = seqlen_k;
  int seen_by_any = seqlen_k;
  if constexpr (kCausal) {
    seen_by_all = max(0, min(seqlen_k, row_begin + causal_offset + 1));
    seen_by_any = max(0, min(seqlen_k, row_end + causal_offset));
  }
  return {seen_by_all / kBlockN, ceil_div(seen_by_any, kBlockN)};
}
