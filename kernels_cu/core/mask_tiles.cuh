// What a pass over the mask found out (fa2/mask_summary.cu): which tiles it hides whole, which in part, and which keys from
// all queries. A bit for each tile: the next one that is to be visited is found by one read, however many are hidden.
#pragma once
#include "core/modifier_params.cuh"

// Of 32 neighbouring tiles of a query block, or of a key block.
struct TileBits {
  unsigned shown;  // some query sees some key
  unsigned mixed;  // some query does not see some key
};
constexpr int kTilesOfWord = 32;

// The tiles of one query block of one (batch, head), or of one key block of it: by the number of the other block.
struct MaskTiles {
  const TileBits* words;

  __device__ __forceinline__ bool is_mixed(int block) const {
    return kMasks && (words[block / kTilesOfWord].mixed >> block % kTilesOfWord & 1);
  }

  // The last block before this one that is not hidden whole; −1 if there is none.
  __device__ __forceinline__ int before(int block) const {
    if (!kMasks || block <= 0) return block - 1;
    int word = (block - 1) / kTilesOfWord;
    unsigned bits = words[word].shown & (~0u >> (kTilesOfWord * (word + 1) - block));
    while (bits == 0 && --word >= 0) bits = words[word].shown;
    return bits == 0 ? -1 : kTilesOfWord * word + 31 - __clz(bits);
  }

  // The first of the blocks [block, end) that is not hidden whole; `end` if there is none.
  __device__ __forceinline__ int shown_from(int block, int end) const {
    if (block >= end) return end;
    int word = block / kTilesOfWord;
    unsigned bits = words[word].shown & (~0u << block % kTilesOfWord);
    while (bits == 0 && kTilesOfWord * ++word < end) bits = words[word].shown;
    return bits == 0 ? end : min(end, kTilesOfWord * word + __ffs(bits) - 1);
  }

  // How many of the blocks [begin, end) are not hidden whole.
  __device__ __forceinline__ int count_shown(int begin, int end) const {
    int count = 0;
    for (int word = begin / kTilesOfWord; kTilesOfWord * word < end; ++word) {
      const int first = kTilesOfWord * word;
      unsigned bits = words[word].shown;
      if (begin > first) bits &= ~0u << (begin - first);
      if (end < first + kTilesOfWord) bits &= ~(~0u << (end - first));
      count += __popc(bits);
    }
    return count;
  }
};

// The words of one (batch, head): of every query block, and behind them of every key block.
template <class Params>
__device__ __forceinline__ MaskTiles tiles_of_queries(const Params& params, int batch, int head, int m_block) {
  if constexpr (kMasks) {
    const TileStrides& s = params.mask_tiles_strides;
    return {params.mask_tiles + batch * s.batch + head * s.head + m_block * s.query_block};
  } else {
    return {};
  }
}

template <class Params>
__device__ __forceinline__ MaskTiles tiles_of_keys(const Params& params, int batch, int head, int n_block) {
  if constexpr (kMasks) {
    const TileStrides& s = params.mask_tiles_strides;
    return {params.mask_tiles + batch * s.batch + head * s.head + s.of_keys + n_block * s.key_block};
  } else {
    return {};
  }
}
