// The producer of hopper/forward.cu: one thread chooses the tiles of its thread block and starts all their TMA loads. What
// the consumers need next comes first; of a tile that visits key blocks 2, 1 and 0 that is
//
//   Q, K[2] · K[1], V[2] · K[0], V[1] · the next tile's Q and first K, V[0]
//
// With one Q slot, which is not free before V[0] is awaited, V[0] comes before the next tile. After the last tile comes a Q
// slot that says so (kNoTile).
//
// If kZeroesV, a warp beside it stands between TMA and the consumers of V: it zeroes keys that no query sees.
#pragma once
#include "core/scheduler.cuh"
#include "hopper/forward_layout.cuh"

// The warp that zeroes: takes blocks of V from v_landed and passes them to the consumers' ring, until there is none.
__device__ __forceinline__ void zero_landed_v(const Rings& rings, const ForwardParams& params) {
  for (unsigned use = 0;; ++use) {
    rings.v_landed.wait_full(use);
    const VBlock block = rings.v_block(use);
    if (block.n_block == kNoBlock) return;
    if (!block.is_full) {
      zero_unseen_keys<VTile, kBlockN>(rings.smem + kVOffset + use % kStages * VTile::kBytes, params, block.batch,
                                       block.head, block.n_block * kBlockN);
    }
    mbarrier_arrive(rings.v.full(use));
  }
}

struct Work {  // a tile, and what its divisions give: they would delay each load
  WorkTile tile;
  int kv_head;
  int n_first;  // key block
  int first_key;  // of a packed sequence
  KeyBlocks keys;
};

// The thread that loads.
__device__ __forceinline__ void produce(const Rings& rings, const CUtensorMap& q_map, const CUtensorMap& k_map,
                                        const CUtensorMap& v_map, unsigned* tiles_taken, const ForwardParams& params) {
  unsigned use = 0;    // of the K and V rings: key blocks before this one, of all tiles so far
  unsigned q_use = 0;  // of the Q ring: tiles before this one
  const auto load_q = [&](unsigned q_use, const auto& tile) {
    rings.q.wait_empty(q_use);
    rings.tile(q_use) = tile;
    mbarrier_arrive_expect_tx(rings.q.full(q_use), QTile::kBytes);
    const unsigned slot = rings.q.slot(q_use), full = rings.q.full(q_use);
    if constexpr (Config::kVarlen) {
      QTile::load_of_sequence(slot, &q_map, full, tile.m_block * kQueries, tile.head, tile.first_query, tile.queries);
    } else if constexpr (kPack == 1) QTile::load(slot, &q_map, full, tile.m_block * kQueries, tile.head, tile.batch);
    else QTile::load_packed(slot, &q_map, full, tile.m_block * kQueries, tile.head, tile.batch);
  };
  const int mapped = first_mapped_key(params);
  const auto load_k = [&](unsigned use, const auto& work, int n_block) {
    rings.k.wait_empty(use);
    const unsigned full = rings.k.full(use);
    mbarrier_arrive_expect_tx(full, KTile::kBytes);
    const int key = n_block * kBlockN - mapped;
    const unsigned slot = rings.k.slot(use);
    if constexpr (Config::kVarlen) {
      KTile::load_of_sequence(slot, &k_map, full, key, work.kv_head, work.first_key, work.tile.keys);
    } else KTile::load(slot, &k_map, full, key, work.kv_head, work.tile.batch);
  };
  const auto load_v = [&](unsigned use, const auto& work, int n_block) {
    if constexpr (kOInV) mbarrier_wait(rings.o_empty, q_use % 2);
    rings.v.wait_empty(use);
    if constexpr (kZeroesV) {
      rings.v_block(use) = {work.tile.batch, work.tile.head, n_block, work.keys.is_full(n_block)};
    }
    const unsigned landed = kZeroesV ? rings.v_landed.full(use) : rings.v.full(use);
    mbarrier_arrive_expect_tx(landed, VTile::kBytes);
    const int key = n_block * kBlockN - mapped;
    const unsigned slot = rings.v.slot(use);
    if constexpr (Config::kVarlen) {
      VTile::load_of_sequence(slot, &v_map, landed, key, work.kv_head, work.first_key, work.tile.keys);
    } else VTile::load(slot, &v_map, landed, key, work.kv_head, work.tile.batch);
  };

  const int packed_blocks = packed_blocks_of(params);
  const auto m_blocks = [&] { return Config::kVarlen ? packed_blocks : params.m_blocks; };
  const auto tiles = [&] { return Config::kVarlen ? packed_blocks * params.heads_q : params.tiles; };
  const auto work_at = [&](int index) {
    if (index >= tiles()) return Work{{kNoTile, 0, 0}};
    const Tile at = longest_first(index, m_blocks(), params.heads_q, params.batch_heads, params.heads_per_wave);
    int first_key = 0;
    const WorkTile tile = tile_at<kBlockM>(params, at, m_blocks(), first_key);
    const KeyBlocks keys = key_blocks<kQueries, kBlockN>(params, tile);
    const int kv_head = tile.head / params.group_size;
    if constexpr (kBanded || kZeroesV) return Work{tile, kv_head, keys.first(), first_key, keys};
    else return Work{tile, kv_head, keys.first(), first_key};
  };

  // Q and the first key block.
  const auto start_tile = [&](unsigned q_use, unsigned use, const Work& work) {
    load_q(q_use, work.tile);
    load_k(use, work, work.n_first);
  };
  const auto finish = [&] {
    rings.q.wait_empty(q_use);
    rings.tile(q_use) = WorkTile{kNoTile, 0, 0};
    mbarrier_arrive(rings.q.full(q_use));
    if constexpr (kZeroesV) {
      rings.v.wait_empty(use);
      rings.v_block(use) = {0, 0, kNoBlock, 0};
      mbarrier_arrive(rings.v_landed.full(use));
    }
  };

  int index = blockIdx.x;
  Work work = work_at(index);
  if constexpr (Config::kVarlen) {
    if (work.tile.m_block == kNoTile) return finish();  // there are fewer tiles than the host had to allow for
  }
  start_tile(q_use, use, work);
  while (true) {
    Work next;
    const KeyBlocks& keys = work.keys;
    int after = 0;  // with a mask: looking for it takes reading
    for (int n_block = work.n_first; n_block >= keys.begin; n_block = kMasks ? after : n_block - 1, ++use) {
      if constexpr (kMasks) after = keys.after(n_block);
      // The next tile is claimed late, to balance the load, but a block ahead: the counter takes its time to answer.
      // With a mask it is claimed at the first block: nobody knows how many are to come.
      if (n_block == (kMasks ? work.n_first : min(work.n_first, keys.begin + 1))) {
        if constexpr (Config::kDynamicTiles) index = gridDim.x + atomicInc(tiles_taken, tiles() - 1);
        else index += gridDim.x;
      }
      // Always what is needed next comes first; but one Q slot is not free before the last V is awaited.
      const bool is_last = kMasks ? after < keys.begin : n_block == keys.begin;
      if (kMasks ? !is_last : n_block > keys.begin) {
        load_k(use + 1, work, kMasks ? after : n_block - 1);
      } else {
        next = work_at(index);
        if (!kOInV && next.tile.m_block != kNoTile) start_tile(q_use + 1, use + 1, next);
      }
      load_v(use, work, n_block);
      if (kOInV && is_last && next.tile.m_block != kNoTile) start_tile(q_use + 1, use + 1, next);
    }
    ++q_use;
    if (next.tile.m_block == kNoTile) break;
    work = next;
  }
  finish();
}
