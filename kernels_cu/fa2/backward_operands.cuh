// P and dS between the warps of fa2/backward.cu: packed as operands A, each as a [key][query] tile in shared memory.
#pragma once
#include "fa2/backward_layout.cuh"
#include "fa2/products.cuh"
#include "ptx/ldmatrix.cuh"

// Stores P or dS, packed as operands A, into its tile.
template <int kStrips>
__device__ __forceinline__ void store_operand(unsigned char* tile, const OperandA<kStrips, kNTiles / 2>& a, int row,
                                              int chunk) {
#pragma unroll
  for (int m = 0; m < kStrips; ++m) {
#pragma unroll
    for (int i = 0; i < kNTiles * 2; ++i) {
      *reinterpret_cast<unsigned*>(tile + operand_offset<PTile>(row, chunk, m, i / 4, i % 4)) = a.reg[m][i / 4][i % 4];
    }
  }
}

// The same of 16 keys and queries.
__device__ __forceinline__ void store_operand(unsigned char* tile, const unsigned (&a)[4], int row, int chunk) {
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<unsigned*>(tile + operand_offset<PTile>(row, chunk, 0, 0, i)) = a[i];
}

// Loads columns from 8·chunk of it back, as they were stored or, from other columns, as warps beside this one did.
template <int kKTiles>
__device__ __forceinline__ void load_operand(OperandA<kMTiles, kKTiles>& a, unsigned tile_smem, int row, int chunk) {
  const int lane = Fragment::lane();
  const unsigned a_lane = tile_smem + PTile::offset(row + lane % 16, chunk + lane / 16);
#pragma unroll
  for (int kk = 0; kk < kKTiles; ++kk) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      ldmatrix_x4(a.reg[m][kk], PTile::advance(a_lane, 2 * kk) + m * 16 * PTile::kRowBytes);
    }
  }
}

// acc += A B, where A is what this warp has in registers or, if warps share keys, those rows of the tile.
template <int kColumns, int kTiles>
__device__ __forceinline__ void multiply_operand(float (&acc)[kMTiles][kTiles][4],
                                                 const OperandA<kMTiles, kNTiles / 2>& a, unsigned tile_smem, int row,
                                                 unsigned b_smem, int chunk) {
  if constexpr (kColumnWarps == 1) {
    multiply_a_b<Element, kColumns>(acc, a, b_smem, 0);
  } else {
    OperandA<kMTiles, kBlockM / 16> whole;
    load_operand(whole, tile_smem, row, 0);
    multiply_a_b<Element, kColumns>(acc, whole, b_smem, chunk);
  }
}
