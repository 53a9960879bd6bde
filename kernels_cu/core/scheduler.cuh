// Which (query block, head, batch) a thread block of the one-dimensional grid works on.
#pragma once
#include "core/types.cuh"

struct Tile {
  int m_block;
  int head;
  int batch;
};

// Thread blocks start in order of their index. Waves of `heads_per_wave` heads, few enough that their K and V stay in
// L2, follow each other; inside a wave the last query blocks, which under a causal mask see the most keys, go first,
// so that the short ones fill the gaps at the end.
__device__ __forceinline__ Tile longest_first(int index, int m_blocks, int heads_q, int batch_heads, int heads_per_wave) {
  const int wave = index / (m_blocks * heads_per_wave);
  const int in_wave = index - wave * m_blocks * heads_per_wave;
  const int heads_here = min(heads_per_wave, batch_heads - wave * heads_per_wave);
  const int m_reversed = in_wave / heads_here;
  const int batch_head = wave * heads_per_wave + in_wave - m_reversed * heads_here;
  const int batch = batch_head / heads_q;
  return {m_blocks - 1 - m_reversed, batch_head - batch * heads_q, batch};
}
