// Rings of shared-memory slots that one thread fills by TMA, or warps fill by stores, and the consumer warps empty.
#pragma once
#include "ptx/mbarrier.cuh"

// Use number i takes slot i % kStages. Slot s has two barriers:
//   full   completes when the bytes of a use have landed: the producer's arrival and TMA's bytes, or an arrival of each
//          warp that stores
//   empty  completes when all consumers are done with a use: one arrival each
// Each completes once per use, so the parity to wait for is that of i / kStages; the first uses find empty slots.
template <int kStages, int kSlotBytes>
struct Ring {
  static constexpr int kBarrierBytes = kStages * 16;

  unsigned slots_smem;
  unsigned barriers_smem;

  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    for (int slot = 0; slot < kStages; ++slot) {
      mbarrier_init(full(slot), producers);
      mbarrier_init(empty(slot), consumers);
    }
  }

  __device__ __forceinline__ unsigned slot(unsigned use) const { return slots_smem + use % kStages * kSlotBytes; }
  __device__ __forceinline__ unsigned full(unsigned use) const { return barriers_smem + use % kStages * 8; }
  __device__ __forceinline__ unsigned empty(unsigned use) const { return full(use) + kStages * 8; }

  __device__ __forceinline__ void wait_full(unsigned use) const { mbarrier_wait(full(use), use / kStages % 2); }
  __device__ __forceinline__ void wait_empty(unsigned use) const { mbarrier_wait(empty(use), use / kStages % 2 ^ 1); }
};
