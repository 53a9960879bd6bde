// Copies of tiles from global to swizzled shared memory by some of a block's threads.
#pragma once
#include "core/layout.cuh"
#include "ptx/cp_async.cuh"

struct EveryRow {
  __device__ __forceinline__ bool operator()(int row) const { return true; }
};

// Starts the copy of kRows rows by kLoaders threads, of which this is number `loader`. kPeriod neighbouring threads
// read neighbouring chunks of one row; rows from `rows` on, those that `is_read` denies, and
// columns from `columns` on are written as zeros.
template <int kRows, int kColumns, int kLoaders, class Element, class IsRead = EveryRow>
__device__ __forceinline__ void load_tile(unsigned tile_smem, const Element* tile_gmem, long long row_stride, int rows,
                                          int columns, unsigned loader, const IsRead& is_read = {}) {
  using Layout = SwizzledTile<kColumns>;
  constexpr int kRowsPerPass = kLoaders / Layout::kPeriod;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle of a thread's rows is the same in every pass");
  const int row = loader / Layout::kPeriod;
  const int chunk = loader % Layout::kPeriod;
  const Element* source = tile_gmem + row * row_stride + chunk * 8;
  const unsigned target = tile_smem + Layout::offset(row, chunk);
#pragma unroll
  for (int pass = 0; pass < ceil_div(kRows, kRowsPerPass); ++pass) {
    if (kRows % kRowsPerPass == 0 || row + pass * kRowsPerPass < kRows) {
#pragma unroll
      for (int j = 0; j < Layout::kChunks; j += Layout::kPeriod) {
        const bool inside = row + pass * kRowsPerPass < rows && is_read(row + pass * kRowsPerPass) && (chunk + j) * 8 < columns;
        cp_async_16(target + pass * kRowsPerPass * Layout::kRowBytes + j * 16, source + j * 8, inside ? 16 : 0);
      }
    }
    source += kRowsPerPass * row_stride;
  }
}

// The same for kCount floats; the source is 16-byte aligned.
template <int kCount, int kLoaders>
__device__ __forceinline__ void load_floats(unsigned target_smem, const float* source, int loader) {
  static_assert(kCount % 4 == 0 && kCount / 4 <= kLoaders, "16 bytes for each thread");
  if (loader < kCount / 4) cp_async_16(target_smem + loader * 16, source + loader * 4, 16);
}
