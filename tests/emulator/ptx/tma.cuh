// Host twin of kernels_cu/ptx/tma.cuh.
#pragma once
#include "cuda_on_cpu.h"

struct alignas(64) CUtensorMap {
  unsigned long long opaque[16];
};

EMU_INLINE void cp_async_bulk_tensor_4d_load(unsigned smem_address, const CUtensorMap* map, unsigned mbarrier_smem,
                                             int c0, int c1, int c2, int c3) {
  const int coordinates[4] = {c0, c1, c2, c3};
  emu::tma_load(smem_address, map, mbarrier_smem, coordinates, 4);
}
EMU_INLINE void cp_async_bulk_tensor_5d_load(unsigned smem_address, const CUtensorMap* map, unsigned mbarrier_smem,
                                             int c0, int c1, int c2, int c3, int c4) {
  const int coordinates[5] = {c0, c1, c2, c3, c4};
  emu::tma_load(smem_address, map, mbarrier_smem, coordinates, 5);
}
EMU_INLINE void cp_async_bulk_load(unsigned smem_address, const void* gmem, int bytes, unsigned mbarrier_smem) {
  emu::bulk_load(smem_address, gmem, bytes, mbarrier_smem);
}
EMU_INLINE void cp_async_bulk_tensor_4d_store(const CUtensorMap* map, unsigned smem_address, int c0, int c1, int c2,
                                              int c3) {
  const int coordinates[4] = {c0, c1, c2, c3};
  emu::tma_store(map, smem_address, coordinates, 4);
}
EMU_INLINE void cp_async_bulk_tensor_5d_store(const CUtensorMap* map, unsigned smem_address, int c0, int c1, int c2,
                                              int c3, int c4) {
  const int coordinates[5] = {c0, c1, c2, c3, c4};
  emu::tma_store(map, smem_address, coordinates, 5);
}
EMU_INLINE void cp_async_bulk_commit_group() { emu::bulk_commit(); }
template <int kPending>
EMU_INLINE void cp_async_bulk_wait_group() {
  static_assert(kPending >= 0, "the number of groups left in flight");
  emu::bulk_wait(kPending, false);
}
template <int kPending>
EMU_INLINE void cp_async_bulk_wait_group_read() {
  static_assert(kPending >= 0, "the number of groups left in flight");
  emu::bulk_wait(kPending, true);
}
