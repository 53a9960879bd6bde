// The products of a backward on one warpgroup: 64 keys against the queries of a block. All are started, not waited for.
#pragma once
#include "core/dq_workspace.cuh"
#include "hopper/products.cuh"
#include "hopper/tile.cuh"
#include "ptx/reduce.cuh"

// acc = A Bᵀ: 64 keys of K or V, from a_smem on, and all queries of Q or dO.
template <class Element, class ATile, class BTile, int kColumns, int kNTiles>
__device__ __forceinline__ void start_transposed(float (&acc)[kNTiles][4], unsigned a_smem, unsigned b_smem) {
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < kColumns / 16; ++k16) {
    wgmma_k_major(Element{}, acc, ATile::k_major(a_smem, k16), BTile::k_major(b_smem, k16), k16 > 0);
  }
  wgmma_commit_group();
}

// acc += Pᵀ dO or dSᵀ Q: 64 keys, kColumns columns in one product.
template <class Element, class Tile, int kColumns, int kDTiles, int kKTiles>
__device__ __forceinline__ void start_gradient(float (&acc)[kDTiles][4], const unsigned (&reg)[kKTiles][4],
                                               unsigned tile_smem) {
  static_assert(kDTiles * 8 % kColumns == 0 && (kColumns % kPanelColumns == 0 || kDTiles * 8 == kColumns),
                "whole panels");
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < kKTiles; ++k16) {
#pragma unroll
    for (int column = 0; column < kDTiles * 8; column += kColumns) {
      auto& part = reinterpret_cast<float(&)[kColumns / 8][4]>(acc[column / 8]);
      const unsigned columns_smem = tile_smem + column / kPanelColumns * Tile::kPanelBytes;
      wgmma_n_major(Element{}, part, reg[k16], Tile::n_major(columns_smem, k16));
    }
  }
  wgmma_commit_group();
}

// acc = dS K, or acc += dS K: 64 queries from ds_smem on, all kKeys keys of the tiles, columns of K from k_smem on.
template <class Element, class DsTile, class KTile, int kKeys, int kNTiles>
__device__ __forceinline__ void start_dq(float (&acc)[kNTiles][4], unsigned ds_smem, unsigned k_smem, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int k16 = 0; k16 < kKeys / 16; ++k16) {
    wgmma_k_n_major(Element{}, acc, DsTile::k_major(ds_smem, k16), KTile::n_major(k_smem, k16), accumulate || k16 > 0);
  }
  wgmma_commit_group();
}

// One part of dQ = dS K: 64 queries and kColumns columns of a block of kBlockM × kHeadDim. kKeys is K's block.
template <class Element, int kBlockM, int kHeadDim, int kKeys, int kColumns>
struct DqPart {
  static_assert(kHeadDim % kColumns == 0 && (kColumns % kPanelColumns == 0 || kColumns == kHeadDim), "whole panels");
  using DsTile = PanelTile<kBlockM, kKeys>;
  using KTile = PanelTile<kKeys, kHeadDim>;
  using Workspace = DqWorkspace<kBlockM, kHeadDim, true>;
  static constexpr int kParts = kBlockM / 64 * (kHeadDim / kColumns);

  int row, column;

  static __device__ __forceinline__ DqPart at(int part) {
    constexpr int kColumnParts = kHeadDim / kColumns;
    return {part / kColumnParts * 64, part % kColumnParts * kColumns};
  }

  __device__ __forceinline__ void start(float (&acc)[kColumns / 8][4], unsigned ds_smem, unsigned k_smem) const {
    start_dq<Element, DsTile, KTile, kKeys>(acc, ds_smem + row * kPanelRowBytes,
                                            k_smem + column / kPanelColumns * KTile::kPanelBytes, false);
  }

  // Adds a warp's 16 queries to a block of the workspace.
  __device__ __forceinline__ void add(float* block, const float (&acc)[kColumns / 8][4], int warp, int lane) const {
    float* const target = block + Workspace::index(row / 16 + warp, column / 8, lane, 0);
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d) red_add_v4_f32(target + Workspace::index(0, d, 0, 0), acc[d]);
  }
};
