// What the kernels of dbias and of the gradients of mod_args share: they compute dS again, after fa2/backward.cu's
// preprocess, in tiles of kBlockM queries and kBlockN keys of which a warp has 16 query rows and every key.
//
// Shared    bytes: K 2·kBlockN·kHeadDim, V 2·kBlockN·kHeadDimV, Q 2·kBlockM·kHeadDim, dO 2·kBlockM·kHeadDimV.
// memory
// Queries   are counted from 0; those from params.first_row on have an lse and a delta.
#pragma once
#include "core/dropout.cuh"
#include "core/fragment.cuh"
#include "core/hide.cuh"
#include "core/is_read.cuh"
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
constexpr int kWarps = kBlockM / 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kNTiles = kBlockN / 8;

constexpr int kVOffset = kBlockN * kHeadDim * 2;  // K is at 0
constexpr int kQOffset = kVOffset + kBlockN * kHeadDimV * 2;
constexpr int kDoutOffset = kQOffset + kBlockM * kHeadDim * 2;

// Starts the loads of K and V of a key/value head; keys that no query of its group sees become zeros.
template <class Params>
__device__ __forceinline__ void load_keys(unsigned k_smem, const Element* k, const Element* v,
                                          const Visible<Params>& visible, int batch, int head_kv, int block_key) {
  const Params& params = visible.params;
  const auto is_read = keys_read(params, batch, head_kv * params.group_size, params.group_size, block_key);
  const int keys = visible.keys() - block_key;
  load_tile<kBlockN, kHeadDim, kThreads>(
      k_smem, k + batch * params.k.batch + head_kv * params.k.head + block_key * params.k.row, params.k.row, keys,
      params.head_dim, threadIdx.x, is_read);
  load_tile<kBlockN, kHeadDimV, kThreads>(
      k_smem + kVOffset, v + batch * params.v.batch + head_kv * params.v.head + block_key * params.v.row, params.v.row,
      keys, params.head_dim_v, threadIdx.x, is_read);
}

// Where the lse and the delta of a head start.
template <class Params>
__device__ __forceinline__ long long first_of_head(const Params& params, int batch, int head) {
  return ((long long)batch * params.heads_q + head) * params.rows_per_head;
}

// Starts the loads of Q and dO of a query head; queries that see no key become zeros.
template <class Params>
__device__ __forceinline__ void load_queries(unsigned k_smem, const Element* q, const Element* dout, const float* lse_log2,
                                             const Visible<Params>& visible, int batch, int head, int block_row) {
  const Params& params = visible.params;
  const int rows_end = min(visible.queries(), params.first_row + params.rows) - block_row;
  const QueryIsRead has_lse = {lse_log2 + first_of_head(params, batch, head)};
  const auto is_seen = [&](int row) {
    const int at = block_row + row - params.first_row;
    return at >= 0 && has_lse(at);
  };
  load_tile<kBlockM, kHeadDim, kThreads>(
      k_smem + kQOffset, q + batch * params.q.batch + head * params.q.head + block_row * params.q.row, params.q.row,
      rows_end, params.head_dim, threadIdx.x, is_seen);
  load_tile<kBlockM, kHeadDimV, kThreads>(
      k_smem + kDoutOffset, dout + batch * params.dout.batch + head * params.dout.head + block_row * params.dout.row,
      params.dout.row, rows_end, params.head_dim_v, threadIdx.x, is_seen);
}

// Of this lane's two rows.
struct RowStatistics { float lse[2], delta[2]; };

template <class Params>
__device__ __forceinline__ RowStatistics row_statistics(const float* lse_log2, const float* delta, const Params& params,
                                                        int batch, int head, int warp_row) {
  RowStatistics of_rows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + Fragment::row(half) - params.first_row;
    const bool inside = row >= 0 && row < params.rows;
    const long long at = first_of_head(params, batch, head) + row;
    of_rows.lse[half] = inside ? lse_log2[at] : infinity();
    of_rows.delta[half] = inside ? delta[at] : 0.0f;
  }
  return of_rows;
}

// dP − delta, where dP = dO Vᵀ is 0 for what dropout dropped.
template <class Params>
__device__ __forceinline__ void dp_minus_delta(float (&ds)[1][kNTiles][4], unsigned k_smem, const RowStatistics& of_rows,
                                               const Params& params, int batch, int head, int warp_row, int block_key) {
  multiply_a_bt<Element, kHeadDimV>(ds, k_smem + kDoutOffset, warp_row % kBlockM, k_smem + kVOffset, 0);
  if constexpr (Config::kDropout) {
#pragma unroll
    for (int i = 0; i < kNTiles * 4; ++i) ds[0][i / 4][i % 4] *= kept_scale(params);
    dropout_of(params, batch, head)
        .template for_each_dropped<false, 1, kNTiles>(warp_row, block_key,
                                                      [&](int, int j, int r) { ds[0][j][r] = 0.0f; });
  }
#pragma unroll
  for (int i = 0; i < kNTiles * 4; ++i) ds[0][i / 4][i % 4] -= of_rows.delta[i % 4 / 2];
}

// Products q·k become P. Calls slope(m, j, r, ∂capped score/∂score) with softcap. Without kReadsBias, add_bias(p) adds it.
template <bool kReadsBias = Config::kBias, class Params, class Slope, class AddBias = AddNothing>
__device__ __forceinline__ void probabilities(float (&p)[1][kNTiles][4], const RowStatistics& of_rows,
                                              const Visible<Params>& visible, int batch, int head, int warp_row,
                                              int block_key, const Slope& slope, const AddBias& add_bias = AddBias{}) {
  const Params& params = visible.params;
  if constexpr (Config::kScoreMod) {
    apply_score_mod<false>(p, warp_row, block_key, visible.queries(), visible.keys(), params, batch, head, 0,
                           [](int, int, int, float) {});
  }
  score_modifiers<Element>(params, batch, head, 0)
      .template apply<false, kReadsBias>(p, warp_row, block_key, visible.queries(), visible.keys(), slope);
  if constexpr (Config::kBias && !kReadsBias) add_bias(p[0]);
  hide<false>(p, warp_row, block_key, visible, mask_of(params, batch, head, 0), -infinity());
#pragma unroll
  for (int i = 0; i < kNTiles * 4; ++i) {
    float& x = p[0][i / 4][i % 4];
    x = ex2_approx(x - of_rows.lse[i % 4 / 2]);
  }
}
