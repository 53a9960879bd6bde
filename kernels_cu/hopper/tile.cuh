// Tiles as TMA brings them and wgmma reads them: panels of 64 columns, in each one row after the other, 128 bytes
// each, with TMA's 128-byte swizzle.
#pragma once
#include "core/types.cuh"
#include "ptx/tma.cuh"

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;

// Row `row` of the sequence that is rows [first, first + rows) of a packed tensor, as coordinates of a map in which every
// sequence ends where an axis does: TMA fills and clips what is past it. Axis `row` has kOrigin elements, so that the last
// of the sequence is its last; axis `end` moves that to the sequence's end, and the last axis, at kOrigin, takes kOrigin
// rows back: its step is 2^34 bytes less a row, and 2^30 · 2^34 is 0 in 64 bits. (Triton's ragged descriptors.)
struct PackedRows {
  static constexpr int kOrigin = 1 << 30;
  int row, end;
  __device__ __forceinline__ PackedRows(int first, int rows, int row) : row(kOrigin - rows + row), end(first + rows) {}
};

// kRows × kColumns elements of 16 bits. Tiles start at multiples of 1024 bytes, which the swizzle repeats after.
template <int kRows, int kColumns>
struct PanelTile {
  static_assert(kRows % 8 == 0 && kColumns % 16 == 0, "whole swizzle atoms and k16 steps");
  static constexpr int kPanels = ceil_div(kColumns, kPanelColumns);
  static constexpr int kPanelBytes = kRows * kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;  // also what TMA counts: zeros are bytes too

  // Byte offset of 16-byte chunk `chunk` of row `row`.
  static __device__ __forceinline__ unsigned offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kPanelRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
  }

  // The same for chunk `first + chunk`, given the address of chunk `first` (0 or 1) and an even `chunk`.
  static __device__ __forceinline__ unsigned advance(unsigned address, int chunk) {
    return (address ^ (chunk % 8 * 16)) + chunk / 8 * kPanelBytes;
  }

  // Starts the loads of the tile whose first row is `row`; one a panel, so that the last is cut off at the head dim.
  static __device__ __forceinline__ void load(unsigned tile_smem, const CUtensorMap* map, unsigned mbarrier_smem,
                                              int row, int head, int batch, int column = 0) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      cp_async_bulk_tensor_4d_load(tile_smem + panel * kPanelBytes, map, mbarrier_smem, column + panel * kPanelColumns,
                                   row, head, batch);
    }
  }

  // The same from rows [first, first + rows) of a packed tensor: those past them are zeros. See PackedRows.
  static __device__ __forceinline__ void load_of_sequence(unsigned tile_smem, const CUtensorMap* map,
                                                          unsigned mbarrier_smem, int row, int head, int first, int rows) {
    const PackedRows at(first, rows, row);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      cp_async_bulk_tensor_5d_load(tile_smem + panel * kPanelBytes, map, mbarrier_smem, panel * kPanelColumns, at.row,
                                   head, at.end, PackedRows::kOrigin);
    }
  }

  // The same from a map of five axes, whose rows are in turn those of neighbouring heads at one position (the map says
  // of how many): `position` is the first one's, and `head` counts such groups of heads.
  static __device__ __forceinline__ void load_packed(unsigned tile_smem, const CUtensorMap* map, unsigned mbarrier_smem,
                                                     int position, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      cp_async_bulk_tensor_5d_load(tile_smem + panel * kPanelBytes, map, mbarrier_smem, panel * kPanelColumns, 0,
                                   position, head, batch);
    }
  }

  // Matrix descriptors of k-step `k16` of the tile.
  //
  // Rows are M or N and columns k (Q, K): groups of 8 rows are 1024 bytes apart. The leading offset is not used.
  static __device__ __forceinline__ unsigned long long k_major(unsigned tile_smem, int k16) {
    return descriptor(tile_smem, 16, k16 / 4 * kPanelBytes + k16 % 4 * 32);
  }
  // Rows are k and columns N (V): panels are kPanelBytes and groups of 8 rows 1024 bytes apart.
  static __device__ __forceinline__ unsigned long long n_major(unsigned tile_smem, int k16) {
    return descriptor(tile_smem, kPanelBytes, k16 * 16 * kPanelRowBytes);
  }

 private:
  // Fields: 0–13 address / 16; 16–29 leading and 32–45 stride byte offset / 16; bit 62, the 128-byte swizzle.
  static __device__ __forceinline__ unsigned long long descriptor(unsigned tile_smem, int leading, int step) {
    constexpr unsigned kHigh = 1024 / 16 | 1u << 30;
    const unsigned low = (tile_smem & 0x3ffff) / 16 + (leading / 16 << 16) + step / 16;
    return low | static_cast<unsigned long long>(kHigh) << 32;
  }
};
