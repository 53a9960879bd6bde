// Which key block a thread block of a backward works on, and which query blocks it visits.
#pragma once
#include "core/scheduler.cuh"

struct BackwardParams {
  int seqlen_k;  // keys that some query sees
  int heads_kv, group_size, batch_heads;  // batch_heads = batch · heads_kv
  int causal_offset;
  int m_blocks, n_blocks, heads_per_wave;
  int key_blocks;  // n_blocks · batch_heads
  float scale_log2, scale;
};

// A query block visited: of a query head of the group, counted from the group's first.
struct QueryBlock { int head, m_block; };

struct KeyBlock {
  int n_block, head, batch;  // head counts key/value heads
  int first_key;
  int m_begin, m_end;        // the query blocks that see some of its keys, the same of every query head of the group
  int visits;                // of all heads together; 0 if no query sees a key

  __device__ __forceinline__ QueryBlock first() const { return {0, m_begin}; }
  __device__ __forceinline__ void advance(QueryBlock& at) const {
    if (++at.m_block == m_end) {
      at.m_block = m_begin;
      ++at.head;
    }
  }
};

// Early keys are seen by the most queries under a causal mask, so those blocks come first.
template <int kBlockM, int kBlockN, bool kCausal>
__device__ __forceinline__ KeyBlock key_block(int index, const BackwardParams& params) {
  const Tile tile = longest_first(index, params.n_blocks, params.heads_kv, params.batch_heads, params.heads_per_wave);
  KeyBlock block;
  block.n_block = params.n_blocks - 1 - tile.m_block;
  block.head = tile.head;
  block.batch = tile.batch;
  block.first_key = block.n_block * kBlockN;
  block.m_begin = kCausal ? max(0, block.first_key - params.causal_offset) / kBlockM : 0;
  block.m_end = params.m_blocks;
  const int of_each_head = block.first_key < params.seqlen_k ? max(0, block.m_end - block.m_begin) : 0;
  block.visits = of_each_head * params.group_size;
  return block;
}
