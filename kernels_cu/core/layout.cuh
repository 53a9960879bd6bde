// Where a tile's elements lie in shared memory: rows of kColumns 16-bit elements, their 16-byte chunks permuted so
// that ldmatrix (8 rows, one chunk each) and the tile loads touch every bank once.
#pragma once
#include "core/types.cuh"

// Chunk c of row r is stored at chunk c ^ f(r). A row of kColumns elements is (odd · kPeriod) chunks long with
// kPeriod = 2, 4 or 8, so 8/kPeriod consecutive rows already start in different banks; f changes once per that many
// rows, and the XOR stays inside aligned groups of kPeriod chunks. For 64 or 128 columns this is the usual
// 128-byte swizzle, c ^ (r % 8).
template <int kColumns>
struct SwizzledTile {
  static_assert(kColumns % 16 == 0, "rows are whole k16 steps");
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowBytes = kColumns * 2;

  static __device__ __forceinline__ int swizzle(int row) { return (row / (8 / kPeriod)) % kPeriod; }

  // Byte offset of chunk `chunk` of row `row`.
  static __device__ __forceinline__ unsigned offset(int row, int chunk) {
    return row * kRowBytes + (chunk / kPeriod * kPeriod + ((chunk % kPeriod) ^ swizzle(row))) * 16;
  }

  // The same for chunk `first + chunk`, given the address of chunk `first` (0 or 1) and a constant even `chunk`:
  // one XOR for the chunks inside a period, an immediate offset for whole periods.
  static __device__ __forceinline__ unsigned advance(unsigned address, int chunk) {
    return (address ^ (chunk % kPeriod * 16)) + chunk / kPeriod * kPeriod * 16;
  }
};
