// Host twin of kernels_cu/ptx/fence.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
EMU_INLINE void fence_proxy_async_shared() { emu::fence_proxy_async(); }
