// Host twin of kernels_cu/ptx/prefetch.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void prefetch_l2(const void* address) {
  // Not more than a hint, but one that must be to memory of an array: reading it lets the checks see that.
  [[maybe_unused]] const volatile char byte = *static_cast<const char*>(address);
}
