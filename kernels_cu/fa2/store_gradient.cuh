// The way of a warp's accumulators to a gradient in memory: scaled, rounded, and 16 bytes at a time where rows allow.
#pragma once
#include "core/fragment.cuh"
#include "core/layout.cuh"
#include "core/types.cuh"
#include "fa2/products.cuh"

// Stores a warp's rows and columns of dK or dV, times factor, by way of a tile in shared memory.
template <int kColumns, class Element, int kMTiles, int kTiles>
__device__ __forceinline__ void store_gradient(const float (&acc)[kMTiles][kTiles][4], float factor,
                                               unsigned char* tile, int tile_row, int tile_chunk, Element* gradient,
                                               long long row_stride, int rows, int columns) {
  using Layout = SwizzledTile<kColumns>;
  const int lane = Fragment::lane();
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const float(&pair)[4] = acc[m][i / 2];
      *reinterpret_cast<unsigned*>(tile + operand_offset<Layout>(tile_row, tile_chunk, m, i / 4, i % 4)) =
          Element::pack(pair[i % 2 * 2] * factor, pair[i % 2 * 2 + 1] * factor);
    }
  }
  __syncwarp();  // a warp stores only what it wrote
  constexpr int kLanesPerRow = Layout::kPeriod;
  constexpr int kRowsPerPass = kWarpSize / kLanesPerRow;
#pragma unroll
  for (int pass = 0; pass < ceil_div(16 * kMTiles, kRowsPerPass); ++pass) {
    const int row = tile_row + pass * kRowsPerPass + lane / kLanesPerRow;
    if (row >= tile_row + 16 * kMTiles || row >= rows) continue;
#pragma unroll
    for (int j = 0; j < kTiles; j += kLanesPerRow) {
      const int chunk = tile_chunk + j + lane % kLanesPerRow;
      const Vector16 vector = *reinterpret_cast<const Vector16*>(tile + Layout::offset(row, chunk));
      Element* target = gradient + row * row_stride + chunk * 8;
      if constexpr (Config::kVectorOut) {
        if (chunk * 8 < columns) *reinterpret_cast<Vector16*>(target) = vector;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const unsigned short bits = vector.words[i / 2] >> (i % 2 * 16);
          if (chunk * 8 + i < columns) target[i].bits = bits;
        }
      }
    }
  }
}
