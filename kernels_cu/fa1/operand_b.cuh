// Operands B of one warp's products, loaded once and used for a whole pass over the query blocks.
#pragma once
#include "core/layout.cuh"
#include "fa2/products.cuh"
#include "ptx/ldmatrix.cuh"

// kKTiles · 16 rows to be summed over, kNTiles · 8 columns.
template <int kKTiles, int kNTiles>
struct OperandB {
  unsigned reg[kKTiles][kNTiles / 2][4];
};

// Bᵀ lies in memory: kNTiles · 8 rows of the tile, from its start, are the columns of B.
template <int kColumns, int kKTiles, int kNTiles>
__device__ __forceinline__ void load_transposed(OperandB<kKTiles, kNTiles>& b, unsigned tile_smem) {
  using Tile = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
  const unsigned b_lane = tile_smem + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int kk = 0; kk < kKTiles; ++kk) {
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
      ldmatrix_x4(b.reg[kk][n], Tile::advance(b_lane, 2 * kk) + n * 16 * Tile::kRowBytes);
    }
  }
}

// B lies in memory: kKTiles · 16 rows of the tile, from its start.
template <int kColumns, int kKTiles, int kNTiles>
__device__ __forceinline__ void load(OperandB<kKTiles, kNTiles>& b, unsigned tile_smem) {
  using Tile = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
  const unsigned b_lane = tile_smem + Tile::offset(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < kKTiles; ++kk) {
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
      ldmatrix_x4_trans(b.reg[kk][n], Tile::advance(b_lane, 2 * n) + kk * 16 * Tile::kRowBytes);
    }
  }
}

// acc += A B: rows from the start of tile A.
template <class Element, int kColumns, int kMTiles, int kKTiles, int kNTiles>
__device__ __forceinline__ void multiply(float (&acc)[kMTiles][kNTiles][4], unsigned a_smem,
                                         const OperandB<kKTiles, kNTiles>& b) {
  using Tile = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
  const unsigned a_lane = a_smem + Tile::offset(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < kKTiles; ++kk) {
    unsigned a_reg[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) ldmatrix_x4(a_reg[m], Tile::advance(a_lane, 2 * kk) + m * 16 * Tile::kRowBytes);
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Element::mma(acc[m][2 * n], a_reg[m], b.reg[kk][n][0], b.reg[kk][n][1]);
        Element::mma(acc[m][2 * n + 1], a_reg[m], b.reg[kk][n][2], b.reg[kk][n][3]);
      }
    }
  }
}

// The same with A in registers.
template <class Element, int kMTiles, int kKTiles, int kNTiles>
__device__ __forceinline__ void multiply(float (&acc)[kMTiles][kNTiles][4], const OperandA<kMTiles, kKTiles>& a,
                                         const OperandB<kKTiles, kNTiles>& b) {
#pragma unroll
  for (int kk = 0; kk < kKTiles; ++kk) {
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Element::mma(acc[m][2 * n], a.reg[m][kk], b.reg[kk][n][0], b.reg[kk][n][1]);
        Element::mma(acc[m][2 * n + 1], a.reg[m][kk], b.reg[kk][n][2], b.reg[kk][n][3]);
      }
    }
  }
}
