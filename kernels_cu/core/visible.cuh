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
    const int queries = read_length(params.query_padding, batch * params.query_padding_stride,
                                    params.query_padding_bytes, first_query + params.seqlen_q);
    visible.padded_queries = max(0, queries - first_query);
    // Keys that only padding sees are never read.
    if (visible.padded_queries == 0) visible.padded_keys = 0;
    if constexpr (Config::kCausal) {
      visible.padded_keys = max(0, min(visible.padded_keys, visible.padded_queries + params.causal_offset));
    }
  }
  return visible;
}

// Keys that the window shows to no query are never read.
template <class Params>
__device__ __forceinline__ bool is_in_window(const Params& params, int key) {
  if constexpr (Config::kWindow) return key >= params.first_key;
  else return true;
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
    tiles.begin = max(0, row_begin + params.window_offset) / kBlockN;
    tiles.full_begin = ceil_div(max(0, row_end - 1 + params.window_offset), kBlockN);
  }
  if constexpr (Config::kQueryPadding) {
    // Rows of padding among others have to be hidden in every tile.
    if (row_end < min(row_begin + kBlockM, params.seqlen_q)) tiles.full_end = 0;
    if (row_end <= row_begin) tiles.end = 0;
  }
  return tiles;
}
