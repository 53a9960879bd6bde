// What both decode kernels are told of a call, and the lengths of one sequence.
#pragma once
#include "core/read_value.cuh"
#include "core/types.cuh"

// How a kernel walks (batch, seqlen, heads, head_dim), or a cache of (pages, page_size, heads, head_dim).
struct RowStrides {
  long long outer, row, head, column;  // in elements; outer is from sequence to sequence, or from page to page
};

struct DecodeParams {
  RowStrides q, k, v, k_cache, v_cache, out;
  long long cos_row, cos_column, sin_row, sin_column;     // in elements, as all strides here
  long long seqlens_stride, table_row, table_column;      // of cache_seqlens, and of block_table or cache_batch_idx
  int seqlen_q, seqlen_new, capacity;                     // capacity: keys that the cache can hold of one sequence
  int heads_kv, m_blocks, append_blocks;
  int splits, fan_in, nodes, part_rows;  // of the tree of parts; part_rows: rows of a block, at most those there are
  int head_dim, head_dim_v, window_left, window_right;
  int seqlens_bytes, table_bytes, rotary_bytes, rotary_pairs, rotary_positions;
  float scale_log2;  // |scale|·log2(e)
};

using Element = Config::Element;

constexpr bool kPaged = Config::kPageSize != 0;
constexpr unsigned kPageSize = kPaged ? Config::kPageSize : 1;  // a constant: it divides on the way to the first load

// Keys in the cache before the call, and with those that it appends.
struct Sequence {
  int before, length;
};

// Lengths are on the device or, without an array, the same number for all. Whatever they are, no slot outside the
// cache is touched.
__device__ __forceinline__ Sequence sequence_of(const void* cache_seqlens, long long uniform, const DecodeParams& params,
                                                int batch) {
  int before = static_cast<int>(uniform);
  if (cache_seqlens != nullptr) {
    before = read_length(cache_seqlens, batch * params.seqlens_stride, params.seqlens_bytes,
                         params.capacity - params.seqlen_new);
  }
  return {before, before + params.seqlen_new};
}

// Where a key of a sequence lies.
struct Slot {
  int outer;  // page, or row of an unpaged cache
  int row;    // in it

  // That of another lane of the warp.
  __device__ __forceinline__ Slot of_lane(int lane) const {
    return {__shfl_sync(0xffffffffu, outer, lane), __shfl_sync(0xffffffffu, row, lane)};
  }

  template <class T>
  __device__ __forceinline__ T* in(T* head, const RowStrides& strides) const {
    return head + static_cast<long long>(outer) * strides.outer + row * strides.row;
  }
};

// Of one sequence. `table` is its row of block_table; without pages `outer` is its row of the cache.
struct Slots {
  const void* table;
  long long table_column;
  int outer, table_bytes;

  __device__ __forceinline__ Slot at(int position) const {
    if constexpr (!kPaged) {
      return {outer, position};
    } else {
      const int page = position / kPageSize;
      return {read_index(table, page * table_column, table_bytes), static_cast<int>(position % kPageSize)};
    }
  }
};

__device__ __forceinline__ Slots slots_of(const void* table, const DecodeParams& params, int batch) {
  Slots slots = {table, params.table_column, batch, params.table_bytes};
  if constexpr (kPaged) {
    slots.table = static_cast<const char*>(table) + batch * params.table_row * params.table_bytes;
  } else if (table != nullptr) {  // cache_batch_idx
    slots.outer = read_index(table, batch * params.table_row, params.table_bytes);
  }
  return slots;
}
