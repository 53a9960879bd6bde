// Products of tiles by one warp, on mma.sync: operands in shared memory, or A in registers.
#pragma once
#include "core/fragment.cuh"
#include "core/layout.cuh"
#include "ptx/ldmatrix.cuh"

// 16·kMTiles × 16·kKTiles values as operands A: register i of tile kk holds row 8·(i % 2) + lane/4 and columns
// 16·kk + 8·(i / 2) + 2·(lane % 4) and the next. That is how an accumulator of a product has them.
template <int kMTiles, int kKTiles>
struct OperandA {
  unsigned reg[kMTiles][kKTiles][4];
};

template <class Element, int kMTiles, int kNTiles>
__device__ __forceinline__ void pack(OperandA<kMTiles, kNTiles / 2>& a, const float (&acc)[kMTiles][kNTiles][4]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kNTiles * 2; ++i) {
      const float(&pair)[4] = acc[m][i / 2];
      a.reg[m][i / 4][i % 4] = Element::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
  }
}

// Address of register i of tile kk of the warp whose rows start at `row` and columns at 8·chunk.
template <class Tile>
__device__ __forceinline__ unsigned operand_offset(int row, int chunk, int m, int kk, int i) {
  return Tile::offset(row + 16 * m + Fragment::row(i % 2), chunk + 2 * kk + i / 2) + Fragment::lane() % 4 * 4;
}

// acc += A Bᵀ over kColumns: rows from a_row of tile A, rows from b_row (a multiple of 8) of tile B.
template <class Element, int kColumns, int kMTiles, int kNTiles>
__device__ __forceinline__ void multiply_a_bt(float (&acc)[kMTiles][kNTiles][4], unsigned a_smem, int a_row,
                                              unsigned b_smem, int b_row) {
  using Tile = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
  const unsigned a_lane = a_smem + Tile::offset(a_row + lane % 16, lane / 16);
  const unsigned b_lane = b_smem + Tile::offset(b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int kk = 0; kk < kColumns / 16; ++kk) {
    unsigned a_reg[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) ldmatrix_x4(a_reg[m], Tile::advance(a_lane, 2 * kk) + m * 16 * Tile::kRowBytes);
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
      unsigned b_reg[4];
      ldmatrix_x4(b_reg, Tile::advance(b_lane, 2 * kk) + n * 16 * Tile::kRowBytes);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Element::mma(acc[m][2 * n], a_reg[m], b_reg[0], b_reg[1]);
        Element::mma(acc[m][2 * n + 1], a_reg[m], b_reg[2], b_reg[3]);
      }
    }
  }
}

// acc += A B: A in registers, columns from 8·chunk (a whole number of swizzle periods) of tile B.
template <class Element, int kColumns, int kMTiles, int kNTiles, int kKTiles>
__device__ __forceinline__ void multiply_a_b(float (&acc)[kMTiles][kNTiles][4], const OperandA<kMTiles, kKTiles>& a,
                                             unsigned b_smem, int chunk) {
  using Tile = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
  const unsigned b_lane = b_smem + Tile::offset(lane % 16, chunk + lane / 16);
#pragma unroll
  for (int kk = 0; kk < kKTiles; ++kk) {
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
      unsigned b_reg[4];
      ldmatrix_x4_trans(b_reg, Tile::advance(b_lane, 2 * n) + kk * 16 * Tile::kRowBytes);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Element::mma(acc[m][2 * n], a.reg[m][kk], b_reg[0], b_reg[1]);
        Element::mma(acc[m][2 * n + 1], a.reg[m][kk], b_reg[2], b_reg[3]);
      }
    }
  }
}

// acc += Aᵀ B over kRows rows of both: columns from 16·a_tile of tile A, and from 16·b_tile of tile B, where only
// b_tiles 16-column tiles are left.
template <class Element, int kRows, int kColumnsA, int kColumnsB, int kMTiles, int kNTiles>
__device__ __forceinline__ void multiply_at_b(float (&acc)[kMTiles][kNTiles][4], unsigned a_smem, int a_tile,
                                              unsigned b_smem, int b_tile, int b_tiles) {
  using TileA = SwizzledTile<kColumnsA>;
  using TileB = SwizzledTile<kColumnsB>;
  const int lane = Fragment::lane();
  unsigned a_lane[kMTiles], b_lane[kNTiles / 2];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    a_lane[m] = a_smem + TileA::offset(lane % 8 + lane / 16 * 8, 2 * (a_tile + m) + lane / 8 % 2);
  }
#pragma unroll
  for (int n = 0; n < kNTiles / 2; ++n) b_lane[n] = b_smem + TileB::offset(lane % 16, 2 * (b_tile + n) + lane / 16);
#pragma unroll
  for (int kk = 0; kk < kRows / 16; ++kk) {
    unsigned a_reg[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) ldmatrix_x4_trans(a_reg[m], a_lane[m] + kk * 16 * TileA::kRowBytes);
#pragma unroll
    for (int n = 0; n < kNTiles / 2; ++n) {
      if (n >= b_tiles) continue;
      unsigned b_reg[4];
      ldmatrix_x4_trans(b_reg, b_lane[n] + kk * 16 * TileB::kRowBytes);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Element::mma(acc[m][2 * n], a_reg[m], b_reg[0], b_reg[1]);
        Element::mma(acc[m][2 * n + 1], a_reg[m], b_reg[2], b_reg[3]);
      }
    }
  }
}
