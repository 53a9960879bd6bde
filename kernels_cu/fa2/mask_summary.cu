// One pass over a mask, a mask_mod or both before the kernels that look at it tile by tile: which tiles it hides whole, and
// need no visit; which it shows whole, and need no look at the mask; and which keys some query sees, for nothing else is
// loaded.
//
// Grid     one dimension: a thread block per (kBlockN keys, kBlockM queries, head, batch) of the mask, as often as it has
//          these: once for an axis that is broadcast, or whose index a mask_mod does not name.
// Threads  kThreads; kBlockN neighbours read a row.
// Memory   reads the mask once, through its strides. keys_seen is zeros before; whoever sees a key makes it 1, in any
//          order.
// Words    of tiles, in any order: an OR of bits.
// Masks    what a causal mask and a window hide is no part of the mask here, but keeps a tile from being visited all the
//          same, and a key from being seen. A mask that is broadcast along the queries has one row, which stands for all.
// Speed    limited by memory.
#include "core/mask_tiles.cuh"
#include "core/types.cuh"
#include "ptx/shared_memory.cuh"

struct MaskSummaryNumbers {
  OperandStrides mask;       // of its elements
  int first_row;             // where the kernel's queries start
  int seqlen_q, seqlen_k;    // of the mask from there on: seqlen_q is 1 if it is broadcast
  int heads, m_blocks, n_blocks;
  int query_words, key_words;  // of a query block, and of a key block: of all of the kernel's query blocks
  int causal_offset, window_offset;
};
struct MaskSummaryParams : ModArgAddresses<Config::kModArgs>, MaskSummaryNumbers, ModArgLayouts<Config::kModArgs> {};

constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kThreads = Config::kThreads;
constexpr int kRowsAtOnce = kThreads / kBlockN;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads % kBlockN == 0, "whole rows at once");

// A template, in which programs without a mask_mod need not have it.
template <class Params>
__device__ __forceinline__ bool shows(const Params& params, int batch, int head, int query, int key) {
  return mask_mod(params, batch, head, query, key);
}

extern "C" __global__ void __launch_bounds__(kThreads)
fa2_mask_summary(const unsigned char* __restrict__ mask,  // (batch or 1, heads or 1, seqlen_q or 1, seqlen_k)
                 TileBits* __restrict__ mask_tiles,       // (batch or 1, heads or 1, words), zeros before
                 int* __restrict__ keys_seen,             // (batch or 1, heads or 1, seqlen_k)
                 const __grid_constant__ MaskSummaryParams params) {
  DYN_SMEM(smem);
  int* warp_state = reinterpret_cast<int*>(smem);  // of each warp: 1 if it saw an element, 2 if it saw them all
  const int n_block = blockIdx.x % params.n_blocks;
  const int m_block = blockIdx.x / params.n_blocks % params.m_blocks;
  const int batch_head = blockIdx.x / params.n_blocks / params.m_blocks;
  const int batch = batch_head / params.heads;
  const int head = batch_head - batch * params.heads;
  const int key = n_block * kBlockN + threadIdx.x % kBlockN;
  if constexpr (Config::kMask) {
    mask += batch * params.mask.batch + head * params.mask.head + params.first_row * params.mask.row + key * params.mask.key;
  }

  bool any = false, all = true;
  if (key < params.seqlen_k) {
#pragma unroll 4
    for (int i = threadIdx.x / kBlockN; i < kBlockM; i += kRowsAtOnce) {
      const int query = m_block * kBlockM + i;
      if (query >= params.seqlen_q) break;
      bool shown = true;
      if constexpr (Config::kMask) shown = mask[query * params.mask.row] != 0;
      if constexpr (Config::kMaskMod) shown = shown && shows(params, batch, head, params.first_row + query, key);
      all &= shown;
      bool seen = shown;
      if (params.seqlen_q > 1) {
        if constexpr (Config::kCausal) seen &= key <= query + params.causal_offset;
        if constexpr (Config::kWindow) seen &= key >= query + params.window_offset;
      }
      any |= seen;
    }
    if (any) atomicMax(keys_seen + (long long)batch_head * params.seqlen_k + key, 1);
  }
  const int warp = threadIdx.x / kWarpSize;
  const int state = __any_sync(0xffffffffu, any) + 2 * __all_sync(0xffffffffu, all);
  if (threadIdx.x % kWarpSize == 0) warp_state[warp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
    int some = 0, whole = 2;
    for (int i = 0; i < kWarps; ++i) {
      some |= warp_state[i] & 1;
      whole &= warp_state[i];
    }
    const int of_keys = params.m_blocks * params.query_words;
    mask_tiles += (long long)batch_head * (of_keys + params.n_blocks * params.key_words);
    const auto set = [&](TileBits& word, unsigned bits) {
      if (some) atomicOr(&word.shown, bits);
      if (!whole) atomicOr(&word.mixed, bits);
    };
    set(mask_tiles[m_block * params.query_words + n_block / kTilesOfWord], 1u << n_block % kTilesOfWord);
    TileBits* const of_key_block = mask_tiles + of_keys + n_block * params.key_words;
    if (params.seqlen_q > 1) {
      set(of_key_block[m_block / kTilesOfWord], 1u << m_block % kTilesOfWord);
    } else {
      for (int word = 0; word < params.key_words; ++word) set(of_key_block[word], ~0u);
    }
  }
}
