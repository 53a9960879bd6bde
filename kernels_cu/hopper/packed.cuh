// Tiles of packed sequences (core/packed.cuh) for TMA.
#pragma once
#include "core/packed.cuh"
#include "core/scheduler.cuh"
#include "core/types.cuh"
#include "hopper/tile.cuh"

// What consumers have to know of a tile: its sequence is `batch`, and the other fields are core/packed.cuh's.
struct PackedTile : Tile {
  int first_query, query_rows, queries, keys, diagonal;
};

// With kVarlen a tile says what is otherwise the same for all of a call.
template <bool kVarlen>
struct ChosenTile {
  using Type = Tile;
};
template <>
struct ChosenTile<true> {
  using Type = PackedTile;
};

template <class Tile, class Params>
__device__ __forceinline__ int queries_of(const Tile& tile, const Params& params) {
  if constexpr (Config::kVarlen) return tile.queries;
  else return params.seqlen_q;
}
template <class Tile, class Visible>
__device__ __forceinline__ int keys_of(const Tile& tile, const Visible& visible) {
  if constexpr (Config::kVarlen) return tile.keys;
  else return visible.keys();
}
template <class Tile, class Params>
__device__ __forceinline__ int causal_offset_of(const Tile& tile, const Params& params) {
  if constexpr (Config::kVarlen) return params.causal_offset + tile.diagonal;
  else return params.causal_offset;
}

// What modifiers take for parameters: a copy of the call's for one sequence. No function returns what other programs take,
// the call's: their code stays what it is.
constexpr bool kRestricts = Config::kVarlen && Config::kModified;
template <class Params>
using SequenceParams = typename ChosenParamsOf<kRestricts, Params>::Type;

// `params` become those of a sequence or of a tile's: of one that is not in use, no key is seen.
template <class Params, class Sequence>
__device__ __forceinline__ void restrict_to_all(Params& params, const Sequence& sequence) {
  if constexpr (kRestricts) restrict_to(params, Params(params), sequence, 0, sequence.queries);
}

// How many blocks of queries packed sequences have; the host knows only params.m_blocks, how many they can have.
template <class Params>
__device__ __forceinline__ int packed_blocks_of(const Params& params) {
  if constexpr (Config::kVarlen) return params.blocks[params.m_blocks].block;
  else return 0;
}

// The tile at `at`, of kRows queries. Of packed sequences that counts in the list of `blocks` blocks, from its end, and a
// sequence's last queries, which see the most keys, come first.
template <int kRows, class Params>
__device__ __forceinline__ auto tile_at(const Params& params, Tile at, int blocks, int& first_key) {
  if constexpr (Config::kVarlen) {
    at.m_block = blocks - 1 - at.m_block;
    const Sequence sequence = find_sequence(params, at.m_block, at.batch);
    at.m_block = ceil_div(sequence.query_rows, kRows) - 1 - at.m_block;
    first_key = static_cast<int>(sequence.first_key);
    const int keys = at.m_block * kRows < sequence.queries ? sequence.keys : 0;  // a block not in use sees none
    return PackedTile{at, static_cast<int>(sequence.first_query), sequence.query_rows, sequence.queries, keys,
                      sequence.diagonal};
  } else {
    return at;
  }
}

// Stores a panel of rows from `query` on: those that the sequence has.
template <class Tile>
__device__ __forceinline__ void store_of_sequence(const CUtensorMap* map, unsigned panel_smem, int column, const Tile& tile,
                                                  int query) {
  const PackedRows at(tile.first_query, tile.query_rows, query);
  cp_async_bulk_tensor_5d_store(map, panel_smem, column, at.row, tile.head, at.end, PackedRows::kOrigin);
}

template <class Tile, class Params>
__device__ __forceinline__ void store_lse_of_sequence(float* lse, float row_lse, const Params& params, const Tile& tile,
                                                      int query) {
  if (query >= tile.query_rows) return;
  if (query >= tile.queries) row_lse = -infinity();
  lse[static_cast<long long>(tile.head) * params.seqlen_q + tile.first_query + query] = row_lse;
}
