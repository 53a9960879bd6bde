// What the kernels of dbias and of the gradients of mod_args share: they compute dS again, after fa2/backward.cu's
// preprocess, in tiles of kBlockM queries and kBlockN keys of which a warp has 16·kMTiles query rows and every key.
//
// Shared    kStages slots of K 2·kBlockN·kHeadDim bytes and V 2·kBlockN·kHeadDimV, then as many of Q 2·kBlockM·kHeadDim and
// memory    dO 2·kBlockM·kHeadDimV.
// Queries   are counted from 0; those from params.first_row on have an lse and a delta.
// Hidden    Loads ask neither a mask nor the lse which queries and keys are seen (only lengths of padding, once for a tile),
//           for every copy would wait for the answer. Neither product mixes queries or keys, so whatever is loaded for
//           those that are not seen stays in elements whose P is 0: who adds up P ∘ dS leaves these out, since their dS
//           may be NaN.
#pragma once
#include "core/dropout.cuh"
#include "core/fragment.cuh"
#include "core/hide.cuh"
#include "core/layout.cuh"
#include "core/modifier_params.cuh"
#include "core/score.cuh"
#include "core/score_mod.cuh"
#include "core/strides.cuh"
#include "core/visible.cuh"
#include "fa2/load_tile.cuh"
#include "fa2/products.cuh"
#include "ptx/shared_memory.cuh"

using Element = Config::Element;
constexpr int kBlockM = Config::kBlockM;
constexpr int kBlockN = Config::kBlockN;
constexpr int kHeadDim = Config::kHeadDim;
constexpr int kHeadDimV = Config::kHeadDimV;
constexpr int kMTiles = Config::kMTiles;
constexpr int kWarpRows = 16 * kMTiles;
constexpr int kWarps = kBlockM / kWarpRows;
constexpr int kThreads = kWarps * kWarpSize;

constexpr int kVOffset = kBlockN * kHeadDim * 2;  // in a slot of K and V
constexpr int kKeysBytes = kVOffset + kBlockN * kHeadDimV * 2;
constexpr int kDoutOffset = kBlockM * kHeadDim * 2;  // in a slot of Q and dO
constexpr int kQueriesBytes = kDoutOffset + kBlockM * kHeadDimV * 2;
constexpr int kQueriesOffset = Config::kStages * kKeysBytes;

// Starts the loads of K and V of a key/value head.
template <class Params>
__device__ __forceinline__ void load_keys(unsigned keys_smem, const Element* k, const Element* v,
                                          const Visible<Params>& visible, int batch, int head_kv, int block_key) {
  const Params& params = visible.params;
  const int keys = visible.keys() - block_key;
  load_tile<kBlockN, kHeadDim, kThreads>(
      keys_smem, k + batch * params.k.batch + head_kv * params.k.head + block_key * params.k.row, params.k.row, keys,
      params.head_dim, threadIdx.x);
  load_tile<kBlockN, kHeadDimV, kThreads>(
      keys_smem + kVOffset, v + batch * params.v.batch + head_kv * params.v.head + block_key * params.v.row, params.v.row,
      keys, params.head_dim_v, threadIdx.x);
}

// Starts the loads of Q and dO of a query head.
template <class Params>
__device__ __forceinline__ void load_queries(unsigned queries_smem, const Element* q, const Element* dout,
                                             const Visible<Params>& visible, int batch, int head, int block_row) {
  const Params& params = visible.params;
  const int queries = visible.queries() - block_row;
  load_tile<kBlockM, kHeadDim, kThreads>(
      queries_smem, q + batch * params.q.batch + head * params.q.head + block_row * params.q.row, params.q.row, queries,
      params.head_dim, threadIdx.x);
  load_tile<kBlockM, kHeadDimV, kThreads>(
      queries_smem + kDoutOffset, dout + batch * params.dout.batch + head * params.dout.head + block_row * params.dout.row,
      params.dout.row, queries, params.head_dim_v, threadIdx.x);
}

// Of this lane's rows. The lse is +inf where a row sees no key.
struct RowStatistics { float lse[kMTiles][2], delta[kMTiles][2]; };

template <class Params>
__device__ __forceinline__ RowStatistics row_statistics(const float* lse_log2, const float* delta, const Params& params,
                                                        int batch, int head, int warp_row) {
  const long long first = ((long long)batch * params.heads_q + head) * params.rows_per_head;
  RowStatistics of_rows;
#pragma unroll
  for (int i = 0; i < kMTiles * 2; ++i) {
    const int row = warp_row + 16 * (i / 2) + Fragment::row(i % 2) - params.first_row;
    const bool inside = row >= 0 && row < params.rows;
    of_rows.lse[i / 2][i % 2] = inside ? lse_log2[first + row] : infinity();
    of_rows.delta[i / 2][i % 2] = inside ? delta[first + row] : 0.0f;
  }
  return of_rows;
}

// dP = dO Vᵀ becomes dP − delta, where dP is 0 for what dropout dropped.
template <int kNTiles, class Params>
__device__ __forceinline__ void subtract_delta(float (&dp)[kMTiles][kNTiles][4], const RowStatistics& of_rows,
                                               const Params& params, int batch, int head, int warp_row, int key) {
  if constexpr (Config::kDropout) {
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) dp[i / 4 / kNTiles][i / 4 % kNTiles][i % 4] *= kept_scale(params);
    dropout_of(params, batch, head)
        .template for_each_dropped<false, kMTiles, kNTiles>(warp_row, key,
                                                            [&](int m, int j, int r) { dp[m][j][r] = 0.0f; });
  }
#pragma unroll
  for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
    const int m = i / 4 / kNTiles;
    dp[m][i / 4 % kNTiles][i % 4] -= of_rows.delta[m][i % 4 / 2];
  }
}

// Products q·k become P. Calls slope(m, j, r, ∂capped score/∂score) with softcap. Without kReadsBias, add_bias(p) adds it.
template <bool kReadsBias = Config::kBias, int kNTiles, class Params, class Slope, class AddBias = AddNothing>
__device__ __forceinline__ void probabilities(float (&p)[kMTiles][kNTiles][4], const RowStatistics& of_rows,
                                              const Visible<Params>& visible, int batch, int head, int warp_row, int key,
                                              const Slope& slope, const AddBias& add_bias = AddBias{}) {
  const Params& params = visible.params;
  if constexpr (Config::kScoreMod) {
    apply_score_mod<false>(p, warp_row, key, visible.queries(), visible.keys(), params, batch, head, 0,
                           [](int, int, int, float) {});
  }
  score_modifiers<Element>(params, batch, head, 0)
      .template apply<false, kReadsBias>(p, warp_row, key, visible.queries(), visible.keys(), slope);
  if constexpr (Config::kBias && !kReadsBias) add_bias(p);
  bool masked = kMasks || Config::kQueryPadding || !visible.template sees_all<kWarpRows, 8 * kNTiles>(warp_row, key);
#pragma unroll
  for (int i = 0; i < kMTiles * 2; ++i) masked |= of_rows.lse[i / 2][i % 2] == infinity();
  if (masked) {
    hide<false>(p, warp_row, key, visible, mask_of(params, batch, head, 0), -infinity());
#pragma unroll
    for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
      const int m = i / 4 / kNTiles;
      if (of_rows.lse[m][i % 4 / 2] == infinity()) p[m][i / 4 % kNTiles][i % 4] = -infinity();
    }
  }
#pragma unroll
  for (int i = 0; i < kMTiles * kNTiles * 4; ++i) {
    const int m = i / 4 / kNTiles;
    float& x = p[m][i / 4 % kNTiles][i % 4];
    x = ex2_approx(x - of_rows.lse[m][i % 4 / 2]);
  }
}
