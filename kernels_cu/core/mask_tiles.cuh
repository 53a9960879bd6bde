// What a pass over the mask found out (fa2/mask_summary.cu): which tiles it hides whole, and which keys from all queries.
#pragma once
#include "core/modifier_params.cuh"

enum MaskedTile { kHiddenTile, kMixedTile, kFullTile };

// The tiles of one query block of one (batch, head), or of one key block of it: by the number of the other block.
struct MaskTiles {
  const int* tiles;
  long long step;

  __device__ __forceinline__ bool hides(int block) const { return kMasks && tiles[block * step] == kHiddenTile; }
  __device__ __forceinline__ bool is_mixed(int block) const { return kMasks && tiles[block * step] == kMixedTile; }

  // The last block before this one that is not hidden whole; −1 if there is none.
  __device__ __forceinline__ int before(int block) const {
    do --block;
    while (block >= 0 && hides(block));
    return block;
  }
};

// How many of the blocks [begin, end) are not hidden whole, counted by a warp.
__device__ __forceinline__ int count_shown(const MaskTiles& tiles, int begin, int end) {
  int count = 0;
  for (int block = begin + threadIdx.x % 32; block < end; block += 32) count += !tiles.hides(block);
  return __reduce_add_sync(0xffffffffu, count);
}

template <class Params>
__device__ __forceinline__ MaskTiles tiles_of_queries(const Params& params, int batch, int head, int m_block) {
  if constexpr (kMasks) {
    const OperandStrides& s = params.mask_tiles_strides;
    return {params.mask_tiles + batch * s.batch + head * s.head + m_block * s.row, s.key};
  } else {
    return {};
  }
}

template <class Params>
__device__ __forceinline__ MaskTiles tiles_of_keys(const Params& params, int batch, int head, int n_block) {
  if constexpr (kMasks) {
    const OperandStrides& s = params.mask_tiles_strides;
    return {params.mask_tiles + batch * s.batch + head * s.head + n_block * s.key, s.row};
  } else {
    return {};
  }
}
