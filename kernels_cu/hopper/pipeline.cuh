// Rings of shared-memory slots that one thread fills by TMA, or warps fill by stores, and the consumer warps empty.
#pragma once
#include "ptx/mbarrier.cuh"

// Use number i takes slot i % kStages, whose barrier `full` completes when the use has been filled: when the producer
// has arrived and TMA's bytes have landed, or all warps that store have arrived. It completes once per use, so the
// parity to wait for is that of i / kStages. For slots that are known to be empty by other means.
template <int kStages, int kSlotBytes>
struct FilledRing {
  static constexpr int kBarrierBytes = kStages * 8;

  unsigned slots_smem;
  unsigned barriers_smem;

  __device__ __forceinline__ void init(int producers = 1) const {
    for (int slot = 0; slot < kStages; ++slot) mbarrier_init(full(slot), producers);
  }

  __device__ __forceinline__ unsigned slot(unsigned use) const { return slots_smem + use % kStages * kSlotBytes; }
  __device__ __forceinline__ unsigned full(unsigned use) const { return barriers_smem + use % kStages * 8; }
  __device__ __forceinline__ void wait_full(unsigned use) const { mbarrier_wait(full(use), use / kStages % 2); }
};

// Each slot has a second barrier, `empty`, which completes when all consumers are done with a use: one arrival each.
// The first uses find empty slots. Who reads or stores by instructions of its own arrives for itself. One arrival a warp,
// behind __syncwarp, would do and is no faster; but compute-sanitizer's racecheck does not follow that order.
template <int kStages, int kSlotBytes>
struct Ring : FilledRing<kStages, kSlotBytes> {
  using Filled = FilledRing<kStages, kSlotBytes>;
  static constexpr int kBarrierBytes = kStages * 16;

  __device__ __forceinline__ void init(int consumers, int producers = 1) const {
    Filled::init(producers);
    for (int slot = 0; slot < kStages; ++slot) mbarrier_init(empty(slot), consumers);
  }

  __device__ __forceinline__ unsigned empty(unsigned use) const { return Filled::full(use) + kStages * 8; }
  __device__ __forceinline__ void wait_empty(unsigned use) const { mbarrier_wait(empty(use), use / kStages % 2 ^ 1); }
};
