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

// Starts the load of the tile whose first query is `query` and first key `key`.
template <class BiasTile, class Params>
__device__ __forceinline__ void load_bias(unsigned tile_smem, const Params& params, unsigned mbarrier_smem, int query,
                                          int head, int batch, int key) {
  if constexpr (Config::kBiasTiles) {
    BiasTile::load(tile_smem, &params.bias_map, mbarrier_smem, query, head, batch, key);
  }
}

constexpr bool kReadsBias = Config::kBias && !Config::kBiasTiles;  // where it is used

// Adds four matrices of ldmatrix, in base 2, to the scores of 16 rows and 16 columns: word i is of columns 8·(i / 2) + …
template <class Element>
__device__ __forceinline__ void add_words(float (&left)[4], float (&right)[4], const unsigned (&bias_reg)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const FloatPair pair = widen<Element>(bias_reg[i]);
    float(&scores)[4] = i < 2 ? left : right;
    scores[i % 2 * 2] += pair.lo * kLog2E;
    scores[i % 2 * 2 + 1] += pair.hi * kLog2E;
  }
}

// Adds rows `row` + … of a tile, which are queries, to the scores of a warp.
template <class Element, class BiasTile, int kNTiles>
__device__ __forceinline__ void add_bias(float (&scores)[kNTiles][4], unsigned tile_smem, int row) {
  const int lane = Fragment::lane();
  const unsigned lane_smem = tile_smem + BiasTile::offset(row + lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j < kNTiles; j += 2) {
    unsigned bias_reg[4];
    ldmatrix_x4(bias_reg, BiasTile::advance(lane_smem, j));
    add_words<Element>(scores[j], scores[j + 1], bias_reg);
  }
}

// The same to transposed scores, of keys `key` + … and queries `query` + … of the tile.
template <class Element, class BiasTile>
__device__ __forceinline__ void add_bias_transposed(float (&scores)[2][4], unsigned tile_smem, int key, int query) {
  const int lane = Fragment::lane();
  unsigned bias_reg[4];
  ldmatrix_x4_trans(bias_reg, tile_smem + BiasTile::offset(query + lane / 16 * 8 + lane % 8, key / 8 + lane / 8 % 2));
  add_words<Element>(scores[0], scores[1], bias_reg);
}
