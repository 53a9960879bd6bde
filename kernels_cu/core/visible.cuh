// Which keys a query sees under a causal mask, a window and the lengths of a padded batch, and hence which tiles are
// visited. core/tile_range.cuh and core/mask.cuh are the plain case, of a causal mask and one length.
#pragma once
#include "core/fragment.cuh"
#include "core/read_operand.cuh"
#include "core/tile_range.cuh"

// Of one batch element. Query i sees keys j with j < keys(), j <= i + causal_offset and j >= i + window_offset; queries
// from queries() on are padding and see none. Params has seqlen_q, seqlen_k_visible and causal_offset; what a program
// has no modifier for is read from there.
template <class Params>
struct Visible {
  const Params& params;
  int padded_queries, padded_keys;

  __device__ __forceinline__ int queries() const {
    if constexpr (Config::kQueryPadding) return padded_queries;
    else return params.seqlen_q;
  }
  __device__ __forceinline__ int keys() const {
    if constexpr (Config::kKeyPadding || Config::kQueryPadding) return padded_keys;
    else return params.seqlen_k_visible;
  }

  // Whether queries [query, query + kQueries) see keys [key, key + kKeys) all; padding is taken for any other query.
  template <int kQueries, int kKeys>
  __device__ __forceinline__ bool sees_all(int query, int key) const {
    bool all = key + kKeys <= keys();
    if constexpr (Config::kCausal) all &= key + kKeys - 1 <= query + params.causal_offset;
    if constexpr (Config::kWindow) all &= key >= query + kQueries - 1 + params.window_offset;
    return all;
  }

  // The columns of a tile that its row `row` sees are [first, end). Rows are queries, or keys if kTransposed.
  template <bool kTransposed>
  __device__ __forceinline__ void columns(int row, int& first, int& end) const {
    if constexpr (kTransposed) {
      first = Config::kCausal ? row - params.causal_offset : 0;
      end = queries();
      if constexpr (Config::kWindow) end = min(end, row - params.window_offset + 1);
      if (row >= keys()) end = first;
    } else {
      first = 0;
      if constexpr (Config::kWindow) first = row + params.window_offset;
      end = keys();
      if constexpr (Config::kCausal) end = min(end, row + params.causal_offset + 1);
      if (row >= queries()) end = first;
    }
  }
};

// `first_query` is where the kernel's queries start among all of them.
template <class Params>
__device__ __forceinline__ Visible<Params> visible_in(const Params& params, int batch, int first_query) {
  Visible<Params> visible = {params, params.seqlen_q, params.seqlen_k_visible};
  if constexpr (Config::kKeyPadding) {
    visible.padded_keys = read_length(params.key_padding, batch * params.key_padding_stride, params.key_padding_bytes,
                                      params.seqlen_k_visible);
  }
  if constexpr (Config::kQueryPadding) {
    visible.padded_queries = real_queries(params, batch, first_query);
    // Keys that only padding sees are never read.
    if (visible.padded_queries == 0) visible.padded_keys = 0;
    if constexpr (Config::kCausal) {
      visible.padded_keys = max(0, min(visible.padded_keys, visible.padded_queries + params.causal_offset));
    }
  }
  return visible;
}

// Where the tensor maps of K and V start: at the first key that some query sees. TMA reads zeros before it. Those of packed
// sequences have no such start.
template <class Params>
__device__ __forceinline__ int first_mapped_key(const Params& params) {
  if constexpr (Config::kWindow && !Config::kVarlen) return params.first_key;
  else return 0;
}

// The first key block that a query block sees something of.
template <int kBlockM, int kBlockN, class Params>
__device__ __forceinline__ int first_visited(const Params& params, int m_block) {
  if constexpr (Config::kWindow) return max(0, m_block * kBlockM + params.window_offset) / kBlockN;
  else return 0;
}

// Where visits start: before `full_begin`, tiles are masked in part.
template <bool kWindow>
struct WindowBegin {
  static constexpr int begin = 0, full_begin = 0;
};
template <>
struct WindowBegin<true> {
  int begin, full_begin;
};
struct KeyTiles : TileRange, WindowBegin<Config::kWindow> {};

// Of the queries [row_begin, row_begin + kBlockM).
template <int kBlockM, int kBlockN, class Tiles = KeyTiles, class Params>
__device__ __forceinline__ Tiles visited_tiles(const Visible<Params>& visible, int row_begin) {
  const Params& params = visible.params;
  const int row_end = min(row_begin + kBlockM, visible.queries());
  Tiles tiles;
  static_cast<TileRange&>(tiles) =
      key_tiles<kBlockN, Config::kCausal>(row_begin, row_end, visible.keys(), params.causal_offset);
  if constexpr (Config::kWindow) {
    tiles.begin = first_visited<kBlockM, kBlockN>(params, row_begin / kBlockM);
    tiles.full_begin = ceil_div(max(0, row_end - 1 + params.window_offset), kBlockN);
  }
  if constexpr (Config::kQueryPadding) {
    // Rows of padding among others have to be hidden in every tile.
    if (row_end < min(row_begin + kBlockM, params.seqlen_q)) tiles.full_end = 0;
    if (row_end <= row_begin) tiles.end = 0;
  }
  return tiles;
}

// Where the query blocks end that see some of kBlockN keys from `key` on; their beginning is the causal mask's.
template <int kBlockM, int kBlockN, class Params>
__device__ __forceinline__ int visited_end(const Visible<Params>& visible, int key, int m_blocks) {
  if constexpr (Config::kWindow) {
    const int queries = max(0, min(key + kBlockN, visible.keys()) - visible.params.window_offset);
    m_blocks = min(m_blocks, ceil_div(queries, kBlockM));
  }
  if constexpr (Config::kQueryPadding) m_blocks = min(m_blocks, ceil_div(visible.queries(), kBlockM));
  return m_blocks;
}
