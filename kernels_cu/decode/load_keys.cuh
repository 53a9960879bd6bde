// Copies of keys or values from a cache to swizzled shared memory, by one warp and 16 rows at a time: as many as are
// sure to lie in one page where its size is a multiple of 16.
#pragma once
#include "core/layout.cuh"
#include "decode/chunk.cuh"
#include "ptx/cp_async.cuh"

constexpr int kSlabRows = 16;
constexpr bool kSlabsInPages = Config::kPageSize % kSlabRows == 0;  // each in one; also if there are no pages

// Rows `tile_row` and following of the tile at `tile_offset` of shared memory take the keys from `first` on, of one
// head; keys outside [begin, end) and columns from `columns` on become zeros and are not read. `slot` is the first's.
template <int kColumns>
__device__ __forceinline__ void load_slab(unsigned char* smem, unsigned smem_address, unsigned tile_offset, int tile_row,
                                          const Element* head, const RowStrides& strides, const Slots& slots,
                                          const Slot& slot, int first, int begin, int end, int columns) {
  using Layout = SwizzledTile<kColumns>;
  constexpr int kRowsPerPass = kWarpSize / Layout::kPeriod;
  const int lane = threadIdx.x % kWarpSize;
  const int chunk = lane % Layout::kPeriod;
#pragma unroll
  for (int pass = 0; pass < kSlabRows / kRowsPerPass; ++pass) {
    const int row = pass * kRowsPerPass + lane / Layout::kPeriod;
    const bool is_read = first + row >= begin && first + row < end;
    const Element* source = head;
    if (kSlabsInPages) source = slot.in(head, strides) + row * strides.row;
    else if (is_read) source = slots.at(first + row).in(head, strides);
#pragma unroll
    for (int j = 0; j < Layout::kChunks; j += Layout::kPeriod) {
      const unsigned target = tile_offset + Layout::offset(tile_row + row, chunk + j);
      if constexpr (Config::kAligned) {
        const bool inside = is_read && (chunk + j) * 8 < columns;
        cp_async_16(smem_address + target, source + (chunk + j) * 8, inside ? 16 : 0);
      } else {
        *reinterpret_cast<Vector16*>(smem + target) =
            is_read ? read_chunk(source, strides.column, chunk + j, columns) : Vector16{};
      }
    }
  }
}
