// Which key block a thread block of a backward works on, and which query blocks it visits.
#pragma once
#include "core/is_read.cuh"
#include "core/mask_tiles.cuh"
#include "core/modifier_params.cuh"
#include "core/scheduler.cuh"
#include "core/visible.cuh"

// Of the queries, which are counted from the first that is visited. A plain program is told by lse = +inf where they end.
template <bool kModified>
struct QueryRange {
  int first_row, seqlen_q;
};
template <>
struct QueryRange<false> {};

struct BackwardParams : ModifierParams<Config::kModified>, QueryRange<Config::kModified> {
  int seqlen_k_visible;  // keys that some query sees
  int heads_kv, group_size, batch_heads;  // batch_heads = batch · heads_kv
  int causal_offset;
  int m_blocks, n_blocks, heads_per_wave;
  int key_blocks;  // n_blocks · batch_heads
  float scale_log2, scale;
};

constexpr bool kBanded = Config::kWindow || kMasks;  // more than the ends of rows is hidden
constexpr bool kZeroesKeys = kMasks || Config::kKeyPadding || Config::kQueryPadding;  // TMA brings keys that nobody sees
// TMA brings queries that are padding, or see no key. Not those before the first that sees one, nor past a window of every
// key: the maps leave those out.
constexpr bool kZeroesQueries = kMasks || Config::kBias || Config::kScoreMod || Config::kQueryPadding ||
                                (Config::kWindow && Config::kKeyPadding);

// A query block visited: of a query head of the group, counted from the group's first.
struct QueryBlock { int head, m_block; };

struct KeyBlock {
  int n_block, head, batch;  // head counts key/value heads
  int first_key;
  int m_begin, m_end;        // the query blocks that see some of its keys, the same of every query head of the group
  int visits;                // of all heads together; 0 if no query sees a key

  template <class Params>
  __device__ __forceinline__ QueryBlock first(const Params& params) const {
    QueryBlock at = {0, m_begin};
    if constexpr (kMasks) {
      if (visits > 0) skip_hidden(at, params);
    }
    return at;
  }

  template <class Params>
  __device__ __forceinline__ void advance(QueryBlock& at, const Params& params) const {
    next(at);
    if constexpr (kMasks) skip_hidden(at, params);
  }

  // Keys from there on are seen by nobody.
  template <class Params>
  __device__ __forceinline__ int end(const Params& params) const {
    if constexpr (Config::kModified) return visible_in(params, batch, params.first_row).keys();
    else return params.seqlen_k_visible;
  }

  // Of one query head of the group, by query block.
  template <class Params>
  __device__ __forceinline__ MaskTiles mask_tiles(const Params& params, int head_of_group) const {
    return tiles_of_keys(params, batch, head * params.group_size + head_of_group, n_block);
  }

  // How many thread blocks add to a query block of dQ before this one.
  template <int kBlockM, int kBlockN, class Params>
  __device__ __forceinline__ int turn(const QueryBlock& at, const Params& params) const {
    if constexpr (kBanded) {
      const int from = first_visited<kBlockM, kBlockN>(params, at.m_block);
      const MaskTiles tiles = tiles_of_queries(params, batch, head * params.group_size + at.head, at.m_block);
      return kMasks ? tiles.count_shown(from, n_block) : n_block - from;
    } else {
      return n_block;
    }
  }

 private:
  __device__ __forceinline__ void next(QueryBlock& at) const {
    if (++at.m_block == m_end) {
      at.m_block = m_begin;
      ++at.head;
    }
  }

  template <class Params>
  __device__ __forceinline__ void skip_hidden(QueryBlock& at, const Params& params) const {
    for (; at.head < params.group_size; ++at.head, at.m_block = m_begin) {
      at.m_block = mask_tiles(params, at.head).shown_from(at.m_block, m_end);
      if (at.m_block < m_end) return;
    }
  }
};

// Early keys are seen by the most queries under a causal mask, so those blocks come first.
template <int kBlockM, int kBlockN, bool kCausal, class Params>
__device__ __forceinline__ KeyBlock key_block(int index, const Params& params) {
  const Tile tile = longest_first(index, params.n_blocks, params.heads_kv, params.batch_heads, params.heads_per_wave);
  KeyBlock block;
  block.n_block = params.n_blocks - 1 - tile.m_block;
  block.head = tile.head;
  block.batch = tile.batch;
  block.first_key = block.n_block * kBlockN;
  block.m_begin = kCausal ? max(0, block.first_key - params.causal_offset) / kBlockM : 0;
  block.m_end = params.m_blocks;
  int keys = params.seqlen_k_visible;
  if constexpr (Config::kModified) {
    const Visible<Params> visible = visible_in(params, block.batch, params.first_row);
    block.m_end = visited_end<kBlockM, kBlockN>(visible, block.first_key, params.m_blocks);
    keys = visible.keys();
  }
  const int of_each_head = block.first_key < keys ? max(0, block.m_end - block.m_begin) : 0;
  block.visits = of_each_head * params.group_size;
  if constexpr (kMasks) {
    if (block.visits > 0) {
      block.visits = 0;
      for (int i = 0; i < params.group_size; ++i) {
        block.visits += block.mask_tiles(params, i).count_shown(block.m_begin, block.m_end);
      }
    }
  }
  return block;
}

// The row of the maps of Q and dO, which start at the first query that sees a key, where a query block starts. TMA reads
// zeros before it: with dropout the first block may start at a few blind queries.
template <int kBlockM, class Params>
__device__ __forceinline__ int mapped_row(const Params& params, int m_block) {
  if constexpr (Config::kDropout) return m_block * kBlockM - params.blind_rows;
  else return m_block * kBlockM;
}

// Whether a query of the block does not see one of kKeys keys.
template <int kBlockM, int kKeys, class Params>
__device__ __forceinline__ bool hides_some(const KeyBlock& keys, const QueryBlock& at, int key, const Params& params) {
  if constexpr (Config::kModified) {
    const Visible<Params> visible = visible_in(params, keys.batch, params.first_row);
    return !visible.template sees_all<kBlockM, kKeys>(at.m_block * kBlockM, key) ||
           keys.mask_tiles(params, at.head).is_mixed(at.m_block);
  } else {
    const int last_key = key + kKeys - 1;
    return last_key >= params.seqlen_k_visible ||
           (Config::kCausal && last_key > at.m_block * kBlockM + params.causal_offset);
  }
}
