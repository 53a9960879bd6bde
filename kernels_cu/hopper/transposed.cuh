// P and dS of a backward, transposed: a warpgroup's 64 rows are keys and the columns queries, so that, rounded, they are
// the A operands of dV += Pᵀ dO and dK += dSᵀ Q where they lie.
#pragma once
#include "core/widen.cuh"
#include "hopper/tile.cuh"
#include "ptx/stmatrix.cuh"

// Of each query a float in shared memory; `pairs` starts at the lane's first column.
__device__ __forceinline__ const FloatPair* lane_pairs(const unsigned char* floats) {
  return reinterpret_cast<const FloatPair*>(floats) + Fragment::column(0, 0) / 2;
}

// Scores become P = 2^(scale_log2·s − lse_log2).
template <int kNTiles>
__device__ __forceinline__ void exponentiate(float (&s)[kNTiles][4], float scale_log2, const FloatPair* lse_log2) {
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const FloatPair lse = lse_log2[4 * n];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = ex2_approx(s[n][i] * scale_log2 - (i % 2 == 0 ? lse.lo : lse.hi));
  }
}

// dP becomes dS = P ∘ (dP − delta), from P in float32.
template <int kNTiles>
__device__ __forceinline__ void differentiate(float (&dp)[kNTiles][4], const float (&p)[kNTiles][4],
                                              const FloatPair* delta) {
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const FloatPair of_query = delta[4 * n];
#pragma unroll
    for (int i = 0; i < 4; ++i) dp[n][i] = p[n][i] * (dp[n][i] - (i % 2 == 0 ? of_query.lo : of_query.hi));
  }
}

// The same from P as rounded: fewer registers.
template <class Element, int kNTiles>
__device__ __forceinline__ void differentiate(float (&dp)[kNTiles][4], const unsigned (&p_reg)[kNTiles / 2][4],
                                              const FloatPair* delta) {
#pragma unroll
  for (int i = 0; i < 2 * kNTiles; ++i) {
    const FloatPair of_query = delta[4 * (i / 2)];
    const FloatPair p = widen<Element>(p_reg[i / 4][i % 4]);
    float(&pair)[4] = dp[i / 2];
    pair[i % 2 * 2] = p.lo * (pair[i % 2 * 2] - of_query.lo);
    pair[i % 2 * 2 + 1] = p.hi * (pair[i % 2 * 2 + 1] - of_query.hi);
  }
}

// The accumulator layout is the A-operand layout of the next product: no data moves.
template <class Element, int kNTiles>
__device__ __forceinline__ void round_operand(unsigned (&reg)[kNTiles / 2][4], const float (&x)[kNTiles][4]) {
#pragma unroll
  for (int i = 0; i < kNTiles * 2; ++i) {
    reg[i / 4][i % 4] = Element::pack(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
  }
}

// Stores a warp's 16 keys of dSᵀ, from key `key` of the tile, as columns of dS: rows are queries.
template <class Tile, int kKTiles>
__device__ __forceinline__ void store_transposed(unsigned tile_smem, const unsigned (&reg)[kKTiles][4], int key) {
  const int lane = Fragment::lane();
  const unsigned lane_smem = tile_smem + Tile::offset(lane % 8 + lane / 16 * 8, key / 8 + lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kKTiles; ++k) stmatrix_x4_trans(lane_smem + k * 16 * kPanelRowBytes, reg[k]);
}
