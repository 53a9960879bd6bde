// The gradient of a bias, after fa2/backward.cu's preprocess: dS, summed over whatever the bias is broadcast along.
//
//   dbias = Σ P ∘ (dP − delta),  P = exp(score − lse),  dP = dO Vᵀ
//
// dS is computed again, two of the backward's five products, so that one thread block has all that is added to its tile:
// no atomics, no zeros to start from, always the same bits, and the backward itself is no slower.
//
// Grid      one dimension: a thread block per (split, tile of kBlockM rows and kBlockN keys, head, batch) of the bias, as
//           often as it has these. It loops over every (batch, head, query block) that its tile stands for, or over one of
//           `splits` shares of them: these partial sums are added by fa2/sum_parts.cu.
// Threads   kWarps warps of 16·kMTiles query rows each, which see every key of the tile.
// Loop      with a batch, head and query block for a term, and two slots (kStages):
//             wait for Q, dO, K, V of this term;  start the loads of the next into the other slot
//             for each kStrip keys:  S = Q Kᵀ;  dP = dO Vᵀ;  P;  sum += P ∘ (dP − delta)
//           With one slot loads start when everybody is done with it, and another thread block on the multiprocessor, where
//           two fit, computes meanwhile. K and V of the term before are not loaded again.
// Shared    fa2/score_gradient.cuh; at the end, of a bias that is broadcast along the queries, the sums of the warps:
// memory    kWarps·kBlockN·4 bytes in Q's place.
// Registers sums: kMTiles·kBlockN/2 a thread; the bias: half as many if of 16 bits; S and dP: kMTiles·kStrip.
// Masks     core/hide.cuh in strips that are not seen whole; tiles outside windows, paddings and the causal mask are passed
//           over.
// Speed     docs/modifiers.md.
#include "fa2/score_gradient.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/vector_store.cuh"

struct BiasParams : ModifierParams<true> {
  Strides q, k, v, dout;
  int first_row, rows;  // the queries that have an lse and a delta below
  int rows_per_head;    // of lse_log2 and delta: whole query blocks of the backward
  int seqlen_q, seqlen_k, seqlen_k_visible;
  int batch, heads_q, group_size;
  int head_dim, head_dim_v;
  int causal_offset;
  int m_blocks, n_blocks;                      // of all queries, of all keys
  int bias_batch, bias_heads, bias_rows;       // 1 where it is broadcast
  int bias_m_blocks;                           // of the bias
  int splits;
  float scale_log2;
};

constexpr int kNTiles = kBlockN / 8;
constexpr int kStages = Config::kStages;
constexpr int kStripTiles = Config::kStrip / 8;
static_assert(kStages == 1 || kStages == 2, "one slot, or another that is loaded meanwhile");
static_assert(kBlockN % Config::kStrip == 0 && Config::kStrip % 16 == 0, "whole strips of whole pairs of n8 tiles");
static_assert(kWarps * kBlockN * 4 <= kQueriesBytes, "the sums of the warps fit into Q's place");

struct Term { int number, batch, head, m_block; };

// Four neighbouring elements of one row of two n8 tiles from pairs that four lanes have of both: even lanes get elements of
// the first tile, odd lanes of the second. Stored together they are 32 bytes, a whole sector of L2, in each row.
template <class Element>
__device__ __forceinline__ void exchange_pairs(unsigned (&four)[2], const float (&pairs)[2][2]) {
  const unsigned pair[2] = {Element::pack(pairs[0][0], pairs[0][1]), Element::pack(pairs[1][0], pairs[1][1])};
  const bool odd = Fragment::lane() % 2;
  const unsigned other = __shfl_xor_sync(0xffffffffu, odd ? pair[0] : pair[1], 1);
  four[0] = odd ? other : pair[0];
  four[1] = odd ? pair[1] : other;
}

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
fa2_backward_bias(const Element* __restrict__ q,       // (batch, seqlen_q, heads_q, head_dim)
                  const Element* __restrict__ k,       // (batch, seqlen_k, heads_kv, head_dim)
                  const Element* __restrict__ v,       // (batch, seqlen_k, heads_kv, head_dim_v)
                  const Element* __restrict__ dout,    // (batch, seqlen_q, heads_q, head_dim_v)
                  const float* __restrict__ lse_log2,  // (batch, heads_q, rows_per_head)
                  const float* __restrict__ delta,     // (batch, heads_q, rows_per_head)
                  void* __restrict__ dbias,            // of the shape of bias: of its dtype, or (splits, …) float32
                  const __grid_constant__ BiasParams params) {
  DYN_SMEM(smem);
  const unsigned smem_base = cvta_to_shared(smem);
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * kWarpRows;

  int index = blockIdx.x;
  const int n_block = index % params.n_blocks;
  index /= params.n_blocks;
  const int bias_m_block = index % params.bias_m_blocks;
  index /= params.bias_m_blocks;
  const int bias_head = index % params.bias_heads;
  index /= params.bias_heads;
  const int bias_batch = index % params.bias_batch;
  const int split = index / params.bias_batch;
  const int bias_row = bias_m_block * kBlockM + warp_row;
  const int block_key = n_block * kBlockN;

  // What the tile stands for: `terms` triples of batch, head and query block.
  const int term_m = params.bias_rows == 1 ? params.m_blocks : 1;
  const int term_heads = params.bias_heads == 1 ? params.heads_q : 1;
  const int terms = term_m * term_heads * (params.bias_batch == 1 ? params.batch : 1);
  const int begin = static_cast<int>((long long)terms * split / params.splits);
  const int end = static_cast<int>((long long)terms * (split + 1) / params.splits);
  const int some_m = max(1, term_m), some_heads = max(1, term_heads);  // where there are no terms, to divide by
  Term next = {begin, bias_batch + begin / some_m / some_heads, bias_head + begin / some_m % some_heads,
               bias_m_block + begin % some_m};
  const auto advance = [&] {
    ++next.number;
    if (++next.m_block < bias_m_block + term_m) return;
    next.m_block = bias_m_block;
    if (++next.head < bias_head + term_heads) return;
    next.head = bias_head;
    ++next.batch;
  };
  // To the next term, this one included, in which some query sees some key of the tile.
  const auto skip_hidden = [&] {
    for (; next.number < end; advance()) {
      const KeyTiles tiles = visited_tiles<kBlockM, kBlockN>(visible_in(params, next.batch, 0), next.m_block * kBlockM);
      if (tiles.begin <= n_block && n_block < tiles.end) return;
    }
  };

  // Of the latest loads: their slots, and the batch and key/value head of K and V.
  int queries_slot = 0, keys_slot = 0, loaded = -1;
  const auto start_loads = [&] {
    if (next.number >= end) return;
    const Visible<BiasParams> visible = visible_in(params, next.batch, 0);
    const int head_kv = next.head / params.group_size;
    const int batch_head_kv = next.batch * (params.heads_q / params.group_size) + head_kv;
    if (batch_head_kv != loaded) {
      loaded = batch_head_kv;
      keys_slot = (keys_slot + 1) % kStages;
      load_keys(smem_base + keys_slot * kKeysBytes, k, v, visible, next.batch, head_kv, block_key);
    }
    queries_slot = (queries_slot + 1) % kStages;
    load_queries(smem_base + kQueriesOffset + queries_slot * kQueriesBytes, q, dout, visible, next.batch, next.head,
                 next.m_block * kBlockM);
    cp_async_commit_group();
  };
  skip_hidden();
  start_loads();

  // The bias is the same for all of them, like its gradient.
  BiasPair<Element> bias[kMTiles][kNTiles][2];
  score_modifiers<Element>(params, bias_batch, bias_head, 0)
      .read_bias(bias, bias_row, block_key, params.seqlen_q, params.seqlen_k);
  float sum[kMTiles][kNTiles][4] = {};
  while (next.number < end) {
    cp_async_wait_group<0>();
    __syncthreads();  // the loads of every warp have landed, and with two slots every warp is done with the other
    const Term at = next;
    const unsigned k_smem = smem_base + keys_slot * kKeysBytes;
    const unsigned q_smem = smem_base + kQueriesOffset + queries_slot * kQueriesBytes;
    advance();
    skip_hidden();
    if constexpr (kStages == 2) start_loads();

    const Visible<BiasParams> visible = visible_in(params, at.batch, 0);
    const int row = at.m_block * kBlockM + warp_row;
    // Used after the first products, which hide the wait.
    const RowStatistics of_rows = row_statistics(lse_log2, delta, params, at.batch, at.head, row);
#pragma unroll
    for (int strip = 0; strip < kNTiles; strip += kStripTiles) {
      const int key = block_key + 8 * strip;
      float p[kMTiles][kStripTiles][4] = {}, ds[kMTiles][kStripTiles][4] = {};
      multiply_a_bt<Element, kHeadDim>(p, q_smem, warp_row, k_smem, 8 * strip);
      multiply_a_bt<Element, kHeadDimV>(ds, q_smem + kDoutOffset, warp_row, k_smem + kVOffset, 8 * strip);
      const auto add_bias = [&](float(&scores)[kMTiles][kStripTiles][4]) {
#pragma unroll
        for (int i = 0; i < kMTiles * kStripTiles * 2; ++i) {
          const int m = i / 2 / kStripTiles, j = i / 2 % kStripTiles, half = i % 2;
          bias[m][strip + j][half].stay_packed();
          const FloatPair pair = bias[m][strip + j][half].in_base_2();
          scores[m][j][2 * half] += pair.lo;
          scores[m][j][2 * half + 1] += pair.hi;
        }
      };
      probabilities<false>(p, of_rows, visible, at.batch, at.head, row, key, [](int, int, int, float) {}, add_bias);
      subtract_delta(ds, of_rows, params, at.batch, at.head, row, key);
#pragma unroll
      for (int i = 0; i < kMTiles * kStripTiles * 4; ++i) {
        const int m = i / 4 / kStripTiles, j = i / 4 % kStripTiles;
        if (p[m][j][i % 4] != 0.0f) sum[m][strip + j][i % 4] += p[m][j][i % 4] * ds[m][j][i % 4];
      }
    }
    if constexpr (kStages == 1) {
      __syncthreads();  // every warp is done with the slot
      start_loads();
    }
  }

  const long long bias_head_index = ((long long)split * params.bias_batch + bias_batch) * params.bias_heads + bias_head;
  const bool is_float32 = Config::kBiasFloat32 || params.splits > 1;
  // Where a row's elements from `key` on go.
  const auto address = [&](int row, int key) {
    const long long at = (bias_head_index * params.bias_rows + row) * params.seqlen_k + key;
    return static_cast<char*>(dbias) + at * (is_float32 ? 4 : 2);
  };
  const auto store = [&](int row, int key, float value) {
    if (row >= params.bias_rows || key >= params.seqlen_k) return;
    if (is_float32) *reinterpret_cast<float*>(address(row, key)) = value;
    else reinterpret_cast<Element*>(address(row, key))->bits = Element::pack(value, 0.0f) & 0xffff;
  };
  const auto store_8_bytes = [&](int row, int key, const unsigned (&words)[2]) {
    if (row < params.bias_rows && key < params.seqlen_k) st_global_v2(address(row, key), words);
  };
  // Calls function(row, tile, the row's pairs of this tile and the next).
  const auto for_each_two_tiles = [&](const auto& function) {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles; ++i) {
      const int m = i / kNTiles, half = i % 2, j = i % kNTiles / 2 * 2;
      const float pairs[2][2] = {{sum[m][j][2 * half], sum[m][j][2 * half + 1]},
                                 {sum[m][j + 1][2 * half], sum[m][j + 1][2 * half + 1]}};
      function(bias_row + 16 * m + Fragment::row(half), j, pairs);
    }
  };
  if (params.bias_rows > 1 && params.seqlen_k % 4 != 0) {
    for_each_two_tiles([&](int row, int j, const float(&pairs)[2][2]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store(row, block_key + Fragment::column(j + i / 2, i % 2), pairs[i / 2][i % 2]);
    });
    return;
  }
  if (params.bias_rows > 1 && is_float32) {
    for_each_two_tiles([&](int row, int j, const float(&pairs)[2][2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_8_bytes(row, block_key + Fragment::column(j + i, 0), {__float_as_uint(pairs[i][0]), __float_as_uint(pairs[i][1])});
      }
    });
    return;
  }
  if (params.bias_rows > 1) {
    for_each_two_tiles([&](int row, int j, const float(&pairs)[2][2]) {
      unsigned four[2];
      exchange_pairs<Element>(four, pairs);
      store_8_bytes(row, block_key + 8 * (j + lane % 2) + lane % 4 / 2 * 4, four);
    });
    return;
  }
  // One row for all queries: rows are summed in a warp, then those of the warps.
  __syncthreads();
  float* warp_sums = reinterpret_cast<float*>(smem + kQueriesOffset);
#pragma unroll
  for (int i = 0; i < kNTiles * 2; ++i) {
    float column = 0.0f;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) column += sum[m][i / 2][i % 2] + sum[m][i / 2][2 + i % 2];
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2) column += __shfl_xor_sync(0xffffffffu, column, step);
    if (lane < 4) warp_sums[warp * kBlockN + Fragment::column(i / 2, i % 2)] = column;
  }
  __syncthreads();
  for (int column = threadIdx.x; column < kBlockN; column += kThreads) {
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += warp_sums[i * kBlockN + column];
    store(0, block_key + column, total);
  }
}
