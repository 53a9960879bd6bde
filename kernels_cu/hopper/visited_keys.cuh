// Which key blocks a tile of queries visits in the forward, and which of their keys nobody sees.
#pragma once
#include "core/is_read.cuh"
#include "core/mask_tiles.cuh"
#include "core/modifier_params.cuh"
#include "core/visible.cuh"
#include "hopper/packed.cuh"
#include "hopper/zero_rows.cuh"

constexpr bool kBanded = Config::kWindow || Config::kQueryPadding || kMasks;  // more than the end of a row is hidden
// TMA brings keys that nobody sees. Not those before the first that somebody sees, nor after the last: the maps leave those
// out, but for the former of packed sequences.
constexpr bool kZeroesV = kMasks || Config::kKeyPadding || Config::kQueryPadding || (Config::kWindow && Config::kVarlen);

// The key blocks that a tile visits, from the last down.
struct KeyBlocks : KeyTiles {
  MaskTiles mask_tiles;
  int first_shown;  // if kBanded, the one visited first

  __device__ __forceinline__ int first() const { return kBanded ? first_shown : end - 1; }
  __device__ __forceinline__ int second() const { return kBanded ? after(first_shown) : end - 2; }
  __device__ __forceinline__ int after(int n_block) const { return kMasks ? mask_tiles.before(n_block) : n_block - 1; }
  __device__ __forceinline__ bool is_full(int n_block) const {
    return n_block >= full_begin && n_block < full_end && !mask_tiles.is_mixed(n_block);
  }
};

// After the last tile comes none, which is computed as if it were the first and dropped: where modifiers read, it must exist.
__device__ __forceinline__ int block_of(const Tile& tile) {
  return Config::kModified ? max(tile.m_block, 0) : tile.m_block;
}

// A tile that sees no key passes through the pipeline as one masked block, the first.
template <int kQueries, int kBlockN, class Keys = KeyBlocks, class Params, class WorkTile>
__device__ __forceinline__ Keys key_blocks(const Params& params, const WorkTile& tile) {
  Keys keys;
  const int query = block_of(tile) * kQueries;
  if constexpr (Config::kVarlen && !Config::kModified) {
    static_cast<TileRange&>(keys) =
        key_tiles<kBlockN, Config::kCausal>(query, min(query + kQueries, tile.queries), tile.keys,
                                            causal_offset_of(tile, params));
  } else {
    SequenceParams<Params> of_tile = params;
    restrict_to_all(of_tile, tile);
    static_cast<KeyTiles&>(keys) = visited_tiles<kQueries, kBlockN>(visible_in(of_tile, tile.batch, 0), query);
  }
  if constexpr (kBanded) {
    keys.mask_tiles = tiles_of_queries(params, tile.batch, tile.head, block_of(tile));
    keys.first_shown = keys.after(keys.end);
    if (keys.first_shown < keys.begin) {
      keys.first_shown = 0;
      if constexpr (Config::kWindow) keys.begin = 0;
    }
  } else {
    keys.end = max(keys.end, 1);
  }
  return keys;
}

// One warp: of a block of V, from key `first_key` on, the keys that no query sees become zeros. What is past the end of a
// packed sequence is zeros already.
template <class Tile, int kBlockN, class Params>
__device__ __forceinline__ void zero_unseen_keys(unsigned char* tile, const Params& params, int batch, int head,
                                                 int first_key) {
  SequenceParams<Params> of_batch = params;
  if constexpr (kRestricts) restrict_to_all(of_batch, params.sequences[batch]);
  const int keys = Config::kVarlen ? kBlockN : visible_in(of_batch, batch, 0).keys() - first_key;
  const auto is_read = keys_read(of_batch, batch, head, 1, first_key);
  zero_unread_rows<Tile, kBlockN>(tile, 0, [&](int row) { return row < keys && is_read(row); });
}
