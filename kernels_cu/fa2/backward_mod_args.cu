// The gradients of arguments of a score_mod, after fa2/backward.cu's preprocess:
//
//   darg[element] = Σ dS · ∂score/∂element,  over all (query, key) whose score reads it
//   dS = P ∘ (dP − delta) · softcap's slope,  P = exp(score − lse),  dP = dO Vᵀ
//
// dS is computed again, two of the backward's five products, as fa2/backward_bias.cu does, and the derivative by each
// element that is read by evaluating the formula once more (core/mod_arg_gradient.cuh).
//
// Grid      one dimension: a thread block per (kBlockM queries, head, batch), which loops over the keys that they see.
// Threads   kWarps warps of 16 query rows each, which see every key of a tile.
// Shared    fa2/score_gradient.cuh.
// memory
// Sums      float32, by atomics in any order. A thread adds in registers for as long as a row reads the same element: one
//           of the head or the query costs an atomic a thread or less, one of the key an atomic for each score.
// Masks     core/hide.cuh in tiles that are not seen whole; no derivative is taken where P is 0.
// Speed     docs/modifiers.md.
#include "core/mod_arg_gradient.cuh"
#include "fa2/score_gradient.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/reduce.cuh"

constexpr int kSites = Config::kSites;
constexpr int kNTiles = kBlockN / 8;
static_assert(kMTiles == 1, "the sums of a thread are of two rows");

struct ModArgsParams : ModifierParams<true> {
  Strides q, k, v, dout;
  int first_row, rows;  // the queries that have an lse and a delta below
  int rows_per_head;    // of lse_log2 and delta: whole query blocks of the backward
  int seqlen_q, seqlen_k_visible;
  int heads_q, group_size;
  int head_dim, head_dim_v;
  int causal_offset;
  int m_blocks;  // of all queries
  float scale_log2;
  long long first[kSites];  // where in the sums the array of each site starts
};

template <int kNumber>
struct Site {
  static constexpr int number = kNumber;
};

// Calls function(Site<0>()), …
template <int kFirst = 0, class Function>
__device__ __forceinline__ void for_each_site(const Function& function) {
  if constexpr (kFirst < kSites) {
    function(Site<kFirst>());
    for_each_site<kFirst + 1>(function);
  }
}

// What a thread has to add to one element: the one that it read last.
struct Pending {
  long long at = -1;  // none
  float sum = 0.0f;

  __device__ __forceinline__ void add(float* sums, long long element, float x) {
    if (element != at) {
      flush(sums);
      *this = {element, 0.0f};
    }
    sum += x;
  }

  __device__ __forceinline__ void flush(float* sums) const {
    if (at >= 0) red_add_f32(sums + at, sum);
  }

  // The same by a whole warp, at once where all have one element.
  __device__ __forceinline__ void flush_warp(float* sums) {
    const int low = static_cast<int>(at), high = static_cast<int>(at >> 32);
    bool same = true;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      same &= low == __shfl_xor_sync(0xffffffffu, low, step);
      same &= high == __shfl_xor_sync(0xffffffffu, high, step);
    }
    if (!__all_sync(0xffffffffu, same)) return flush(sums);
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (Fragment::lane() == 0) flush(sums);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, Config::kMinBlocksPerSm)
fa2_backward_mod_args(const Element* __restrict__ q,       // (batch, seqlen_q, heads_q, head_dim)
                      const Element* __restrict__ k,       // (batch, seqlen_k, heads_kv, head_dim)
                      const Element* __restrict__ v,       // (batch, seqlen_k, heads_kv, head_dim_v)
                      const Element* __restrict__ dout,    // (batch, seqlen_q, heads_q, head_dim_v)
                      const float* __restrict__ lse_log2,  // (batch, heads_q, rows_per_head)
                      const float* __restrict__ delta,     // (batch, heads_q, rows_per_head)
                      float* __restrict__ sums,            // of each argument one after the other; zeros before
                      const __grid_constant__ ModArgsParams params) {
  DYN_SMEM(smem);
  const unsigned k_smem = cvta_to_shared(smem);
  const unsigned q_smem = k_smem + kQueriesOffset;
  const int m_block = blockIdx.x % params.m_blocks;
  const int batch_head = blockIdx.x / params.m_blocks;
  const int batch = batch_head / params.heads_q;
  const int head = batch_head - batch * params.heads_q;
  const int head_kv = head / params.group_size;
  const int block_row = m_block * kBlockM;
  const int warp_row = block_row + threadIdx.x / kWarpSize * 16;

  const Visible<ModArgsParams> visible = visible_in(params, batch, 0);
  const KeyTiles tiles = visited_tiles<kBlockM, kBlockN>(visible, block_row);
  if (tiles.begin >= tiles.end) return;

  load_queries(q_smem, q, dout, visible, batch, head, block_row);
  const RowStatistics of_rows = row_statistics(lse_log2, delta, params, batch, head, warp_row);
  const float scale = params.scale_log2 * kLn2;
  Pending pending[kSites][2];  // of either row of this thread
  for (int n_block = tiles.begin; n_block < tiles.end; ++n_block) {
    const int block_key = n_block * kBlockN;
    __syncthreads();  // every warp is done with the tiles before
    load_keys(k_smem, k, v, visible, batch, head_kv, block_key);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncthreads();

    float ds[1][kNTiles][4] = {};
    multiply_a_bt<Element, kHeadDimV>(ds, q_smem + kDoutOffset, warp_row - block_row, k_smem + kVOffset, 0);
    subtract_delta(ds, of_rows, params, batch, head, warp_row, block_key);
    float products[1][kNTiles][4] = {}, p[1][kNTiles][4];
    multiply_a_bt<Element, kHeadDim>(products, q_smem, warp_row - block_row, k_smem, 0);
#pragma unroll
    for (int i = 0; i < kNTiles * 4; ++i) p[0][i / 4][i % 4] = products[0][i / 4][i % 4];
    probabilities(p, of_rows, visible, batch, head, warp_row, block_key,
                  [&](int, int j, int r, float slope) { ds[0][j][r] *= slope; });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = warp_row + Fragment::row(half);
#pragma unroll
      for (int i = 0; i < kNTiles * 2; ++i) {
        const int r = 2 * half + i % 2;
        const float probability = p[0][i / 2][r];
        if (probability == 0.0f) continue;  // hidden: its derivative may be anything
        const float of_score = probability * ds[0][i / 2][r];
        const Dual score = products[0][i / 2][r] * scale;
        const int key = block_key + Fragment::column(i / 2, i % 2);
        for_each_site([&](auto site) {
          constexpr int kSite = decltype(site)::number;
          long long at = -1;
          const Dual modified = score_mod_by<kSite>(params, score, batch, head, query, key, at);
          if (at >= 0) pending[kSite][half].add(sums + params.first[kSite], at, of_score * modified.slope);
        });
      }
    }
  }
  for_each_site([&](auto site) {
    constexpr int kSite = decltype(site)::number;
    for (Pending& of_row : pending[kSite]) of_row.flush_warp(sums + params.first[kSite]);
  });
}
