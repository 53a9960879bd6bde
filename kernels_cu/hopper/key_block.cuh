// Which key block a thread block of a backward works on, and which query blocks it visits.
#pragma once
#include "core/is_read.cuh"
#include "core/mask_tiles.cuh"
#include "core/modifier_params.cuh"
#include "core/packed.cuh"
#include "core/scheduler.cuh"
#include "core/visible.cuh"
#include "hopper/bias_tile.cuh"
#include "hopper/tile.cuh"

// Of the queries, which are counted from the first that is visited. A plain program is told by lse = +inf where they end.
template <bool kModified>
struct QueryRange {
  int first_row, seqlen_q;
};
template <>
struct QueryRange<false> {};

struct BackwardParams : PackedArrays<Config::kVarlen>,
                        ModifierParams<Config::kModified>,
                        QueryRange<Config::kModified> {
  int seqlen_k_visible;  // keys that some query sees
  int heads_kv, group_size, batch_heads;  // batch_heads = batch · heads_kv
  int causal_offset;
  int m_blocks, n_blocks, heads_per_wave;
  int key_blocks;  // n_blocks · batch_heads
  float scale_log2, scale;
};

constexpr bool kBanded = Config::kWindow || kMasks;  // more than the ends of rows is hidden
// TMA brings keys that nobody sees. Not those before the first that somebody sees, nor after the last: the maps leave those
// out, but for the former of packed sequences.
constexpr bool kZeroesKeys = kMasks || Config::kKeyPadding || Config::kQueryPadding || (Config::kWindow && Config::kVarlen);
// TMA brings queries that are padding, or see no key. Not those before the first that sees one, nor past a window of every
// key: the maps leave those out, but for the former of packed sequences with dropout.
constexpr bool kZeroesQueries = kMasks || Config::kBias || Config::kScoreMod || Config::kQueryPadding ||
                                (Config::kWindow && Config::kKeyPadding) || (Config::kDropout && Config::kVarlen);

// A query block visited: of a query head of the group, counted from the group's first.
struct QueryBlock { int head, m_block; };

// Where the rows of a key block's sequence are, with kVarlen.
template <bool kVarlen>
struct SequenceRows {
  static constexpr int first_block = 0;
  static constexpr bool is_none() { return false; }
};
template <>
struct SequenceRows<true> {
  int query_row, queries;  // of packed Q and dO: those that are counted
  int key_row, seen_keys;  // of packed K and V: those that some query sees, …
  int key_rows;            // … and of packed dK and dV: all
  int first_block;         // its first block of queries, among those of all sequences
  int causal_offset;

  // There are fewer key blocks than there could be.
  __device__ __forceinline__ bool is_none() const { return key_rows == 0; }
};

struct KeyBlock : SequenceRows<Config::kVarlen> {
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

  // Query blocks are (batch, heads_q, m_blocks), or with kVarlen those of all sequences, (heads_q, m_blocks).
  __device__ __forceinline__ long long batch_of_blocks() const { return Config::kVarlen ? 0 : batch; }

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

// How many blocks of keys packed sequences have; the host knows only params.n_blocks, how many they can have.
template <class Params>
__device__ __forceinline__ int packed_key_blocks_of(const Params& params) {
  if constexpr (Config::kVarlen) return params.blocks[params.n_blocks].block;
  else return 0;
}

template <class KeyBlock, class Params>
__device__ __forceinline__ void place(KeyBlock& block, const Sequence& sequence, const Params& params) {
  block.query_row = static_cast<int>(sequence.first_query) + params.first_row;
  block.queries = params.seqlen_q;
  block.key_row = static_cast<int>(sequence.first_key);
  block.seen_keys = sequence.keys;
  block.key_rows = sequence.key_rows;
  block.first_block = sequence.first_block;
  block.causal_offset = params.causal_offset;
}

// Early keys are seen by the most queries under a causal mask, so those blocks come first. There are n_blocks of them, or
// fewer, for each head. With kVarlen `params` become `call` for the block's sequence.
template <int kBlockM, int kBlockN, bool kCausal, class Params>
__device__ __forceinline__ KeyBlock key_block(int index, int n_blocks, const BackwardParams& call, Params& params) {
  const int inner_heads = Config::kBiasTiles ? params.batch_heads / params.heads_kv : params.heads_kv;  // as in the forward
  Tile tile = longest_first(index, n_blocks, inner_heads, params.batch_heads, params.heads_per_wave);
  if constexpr (Config::kBiasTiles) tile = {tile.m_block, tile.batch, tile.head};
  KeyBlock block;
  block.n_block = n_blocks - 1 - tile.m_block;
  block.head = tile.head;
  block.batch = tile.batch;
  if constexpr (Config::kVarlen) {
    const Sequence sequence = find_sequence(params, block.n_block, block.batch);
    params.first_row = first_row_of(sequence);
    restrict_to(params, call, sequence, params.first_row, sequence.sees_end);
    place(block, sequence, params);
  }
  block.first_key = block.n_block * kBlockN;
  block.m_begin = kCausal ? max(0, block.first_key - params.causal_offset) / kBlockM : 0;
  block.m_end = params.m_blocks;
  if constexpr (Config::kVarlen) block.m_end = ceil_div(params.seqlen_q, kBlockM);
  int keys = params.seqlen_k_visible;
  if constexpr (Config::kModified) {
    const auto visible = visible_in(params, block.batch, params.first_row);
    block.m_end = visited_end<kBlockM, kBlockN>(visible, block.first_key, block.m_end);
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

// The same, where nobody asks for the parameters of its sequence.
template <int kBlockM, int kBlockN, bool kCausal, class Params>
__device__ __forceinline__ KeyBlock key_block(int index, int n_blocks, const Params& call) {
  if constexpr (Config::kVarlen) {
    Params params = call;
    return key_block<kBlockM, kBlockN, kCausal>(index, n_blocks, call, params);
  } else {
    return key_block<kBlockM, kBlockN, kCausal>(index, n_blocks, call, call);
  }
}

// The row of the maps of Q and dO, which start at the first query that sees a key, where a query block starts. TMA reads
// zeros before it: with dropout the first block may start at a few blind queries.
template <int kBlockM, class Params>
__device__ __forceinline__ int mapped_row(const Params& params, int m_block) {
  if constexpr (Config::kDropout && !Config::kVarlen) return m_block * kBlockM - params.blind_rows;
  else return m_block * kBlockM;
}

// Starts the load of queries of Q or dO from row `row` of their map on, or with kVarlen of their sequence.
template <class Tile, class KeyBlock>
__device__ __forceinline__ void load_queries(unsigned tile_smem, const CUtensorMap* map, unsigned mbarrier_smem, int row,
                                             int head, const KeyBlock& keys) {
  if constexpr (Config::kVarlen) {
    Tile::load_of_sequence(tile_smem, map, mbarrier_smem, row, head, keys.query_row, keys.queries);
  } else {
    Tile::load(tile_smem, map, mbarrier_smem, row, head, keys.batch);
  }
}

// The same of keys of K or V.
template <class Tile, class KeyBlock>
__device__ __forceinline__ void load_keys(unsigned tile_smem, const CUtensorMap* map, unsigned mbarrier_smem, int row,
                                          const KeyBlock& keys) {
  if constexpr (Config::kVarlen) {
    Tile::load_of_sequence(tile_smem, map, mbarrier_smem, row, keys.head, keys.key_row, keys.seen_keys);
  } else {
    Tile::load(tile_smem, map, mbarrier_smem, row, keys.head, keys.batch);
  }
}

// Whether a query of the block does not see one of kKeys keys.
template <int kBlockM, int kKeys, class Params>
__device__ __forceinline__ bool hides_some(const KeyBlock& keys, const QueryBlock& at, int key, const Params& params) {
  if constexpr (Config::kModified) {
    const Visible<Params> visible = visible_in(params, keys.batch, params.first_row);
    if constexpr (Config::kBiasTiles && Config::kQueryPadding) {
      if ((at.m_block + 1) * kBlockM > visible.queries()) return true;  // the bias of padding may be NaN
    }
    return !visible.template sees_all<kBlockM, kKeys>(at.m_block * kBlockM, key) ||
           keys.mask_tiles(params, at.head).is_mixed(at.m_block);
  } else {
    const int last_key = key + kKeys - 1;
    return last_key >= params.seqlen_k_visible ||
           (Config::kCausal && last_key > at.m_block * kBlockM + params.causal_offset);
  }
}

// What a program without modifiers hides: keys from keys_seen on, and those after the diagonal.
template <class KeyBlock, class Params>
__device__ __forceinline__ int keys_seen(const KeyBlock& keys, const Params& params) {
  if constexpr (Config::kVarlen) return keys.seen_keys;
  else return params.seqlen_k_visible;
}
template <class KeyBlock, class Params>
__device__ __forceinline__ int causal_offset_of(const KeyBlock& keys, const Params& params) {
  if constexpr (Config::kVarlen) return keys.causal_offset;
  else return params.causal_offset;
}
