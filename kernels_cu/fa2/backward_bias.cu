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
// Threads   kWarps warps of 16 query rows each, which see every key of the tile.
// Shared    fa2/score_gradient.cuh; at the end, of a bias that is broadcast along the queries, the sums of the warps:
// memory    kWarps·kBlockN·4 bytes in Q's place.
// Masks     core/hide.cuh in every tile; tiles outside windows, paddings and the causal mask are passed over.
// Speed     docs/modifiers.md.
#include "fa2/score_gradient.cuh"
#include "ptx/cp_async.cuh"

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

static_assert(kWarps * kBlockN * 4 <= kBlockM * kHeadDim * 2, "the sums of the warps fit into Q's place");

extern "C" __global__ void __launch_bounds__(kThreads, 2)
fa2_backward_bias(const Element* __restrict__ q,       // (batch, seqlen_q, heads_q, head_dim)
                  const Element* __restrict__ k,       // (batch, seqlen_k, heads_kv, head_dim)
                  const Element* __restrict__ v,       // (batch, seqlen_k, heads_kv, head_dim_v)
                  const Element* __restrict__ dout,    // (batch, seqlen_q, heads_q, head_dim_v)
                  const float* __restrict__ lse_log2,  // (batch, heads_q, rows_per_head)
                  const float* __restrict__ delta,     // (batch, heads_q, rows_per_head)
                  void* __restrict__ dbias,            // of the shape of bias: of its dtype, or (splits, …) float32
                  const __grid_constant__ BiasParams params) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const int lane = Fragment::lane();
  const int warp = threadIdx.x / kWarpSize;

  int index = blockIdx.x;
  const int n_block = index % params.n_blocks;
  index /= params.n_blocks;
  const int bias_m_block = index % params.bias_m_blocks;
  index /= params.bias_m_blocks;
  const int bias_head = index % params.bias_heads;
  index /= params.bias_heads;
  const int bias_batch = index % params.bias_batch;
  const int split = index / params.bias_batch;
  const int block_key = n_block * kBlockN;

  // What the tile stands for: `terms` triples of batch, head and query block.
  const int term_m = params.bias_rows == 1 ? params.m_blocks : 1;
  const int term_heads = params.bias_heads == 1 ? params.heads_q : 1;
  const int terms = term_m * term_heads * (params.bias_batch == 1 ? params.batch : 1);
  const int begin = static_cast<int>((long long)terms * split / params.splits);
  const int end = static_cast<int>((long long)terms * (split + 1) / params.splits);

  // The bias is the same for all of them, like its gradient.
  float bias_log2[kNTiles][4];
  score_modifiers<Element>(params, bias_batch, bias_head, 0)
      .read_bias(bias_log2, bias_m_block * kBlockM + warp * 16, block_key, params.seqlen_q, params.seqlen_k);
  const auto add_bias = [&](float(&p)[kNTiles][4]) {
#pragma unroll
    for (int i = 0; i < kNTiles * 4; ++i) p[i / 4][i % 4] += bias_log2[i / 4][i % 4];
  };
  float sum[kNTiles][4] = {};
  int loaded = -1;  // (batch, key/value head) of the tiles of K and V
  for (int term = begin; term < end; ++term) {
    const int m_block = bias_m_block + term % term_m;
    const int head = bias_head + term / term_m % term_heads;
    const int batch = bias_batch + term / term_m / term_heads;
    const int head_kv = head / params.group_size;
    const int block_row = m_block * kBlockM;
    const Visible<BiasParams> visible = visible_in(params, batch, 0);
    const KeyTiles tiles = visited_tiles<kBlockM, kBlockN>(visible, block_row);
    if (n_block < tiles.begin || n_block >= tiles.end) continue;

    __syncthreads();  // every warp is done with the tiles before
    const int batch_head_kv = batch * (params.heads_q / params.group_size) + head_kv;
    if (batch_head_kv != loaded) {
      loaded = batch_head_kv;
      load_keys(k_smem, k, v, visible, batch, head_kv, block_key);
    }
    load_queries(k_smem, q, dout, lse_log2, visible, batch, head, block_row);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncthreads();

    const int warp_row = block_row + warp * 16;
    const RowStatistics of_rows = row_statistics(lse_log2, delta, params, batch, head, warp_row);
    float p[1][kNTiles][4] = {}, ds[1][kNTiles][4] = {};
    multiply_a_bt<Element, kHeadDim>(p, k_smem + kQOffset, warp * 16, k_smem, 0);
    probabilities<false>(p, of_rows, visible, batch, head, warp_row, block_key, [](int, int, int, float) {}, add_bias);
    dp_minus_delta(ds, k_smem, of_rows, params, batch, head, warp_row, block_key);
#pragma unroll
    for (int i = 0; i < kNTiles * 4; ++i) sum[i / 4][i % 4] += p[0][i / 4][i % 4] * ds[0][i / 4][i % 4];
  }

  const long long bias_head_index = ((long long)split * params.bias_batch + bias_batch) * params.bias_heads + bias_head;
  const auto store = [&](int row, int key, float value) {
    if (row >= params.bias_rows || key >= params.seqlen_k) return;
    const long long at = (bias_head_index * params.bias_rows + row) * params.seqlen_k + key;
    if (Config::kBiasFloat32 || params.splits > 1) static_cast<float*>(dbias)[at] = value;
    else static_cast<Element*>(dbias)[at].bits = Element::pack(value, 0.0f) & 0xffff;
  };
  if (params.bias_rows > 1) {
#pragma unroll
    for (int i = 0; i < kNTiles * 4; ++i) {
      const int row = bias_m_block * kBlockM + warp * 16 + Fragment::row(i % 4 / 2);
      store(row, block_key + Fragment::column(i / 4, i % 2), sum[i / 4][i % 4]);
    }
    return;
  }
  // One row for all queries: rows are summed in a warp, then those of the warps.
  __syncthreads();
  float* warp_sums = reinterpret_cast<float*>(smem + kQOffset);
#pragma unroll
  for (int i = 0; i < kNTiles * 2; ++i) {
    float column = sum[i / 2][i % 2] + sum[i / 2][2 + i % 2];
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
