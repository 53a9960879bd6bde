// A bias by way of shared memory: TMA brings its tiles while the products before run, and ldmatrix gives each thread the
// pairs that its accumulators take. For a bias of Element whose rows TMA can read (kBiasTiles).
#pragma once
#include "core/fragment.cuh"
#include "core/widen.cuh"
#include "hopper/tile.cuh"
#include "ptx/ldmatrix.cuh"

// Params and, if kBiasTiles, the map of the bias: (batch, heads_q, seqlen_q, seqlen_k), of step 0 where it is broadcast.
// Behind the others, so that a program without tiles takes what it took.
template <class Params, bool kBiasTiles>
struct WithBiasMap {
  using Type = Params;
};
template <class Params>
struct WithBiasMap<Params, true> {
  struct Type : Params {
    CUtensorMap bias_map;
  };
};

template <class Params>
__device__ __forceinline__ const CUtensorMap* bias_map_of(const Params& params) {
  if constexpr (Config::kBiasTiles) return &params.bias_map;
  else return nullptr;
}

// Adds a bias, in base 2, to the scores of a warp: 16 rows of the tile, from `row` on.
template <class Element, class BiasTile, int kNTiles>
__device__ __forceinline__ void add_bias(float (&scores)[kNTiles][4], unsigned tile_smem, int row) {
  static_assert(kNTiles % 2 == 0, "ldmatrix takes two of them, of 16 rows");
  const int lane = Fragment::lane();
  const unsigned lane_smem = tile_smem + BiasTile::offset(row + lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j < kNTiles; j += 2) {
    unsigned bias_reg[4];  // word i is of n-tile j + i / 2, rows of half i % 2
    ldmatrix_x4(bias_reg, BiasTile::advance(lane_smem, j));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const FloatPair pair = widen<Element>(bias_reg[i]);
      float* const two_scores = &scores[j + i / 2][i % 2 * 2];
      two_scores[0] += pair.lo * kLog2E;
      two_scores[1] += pair.hi * kLog2E;
    }
  }
}
