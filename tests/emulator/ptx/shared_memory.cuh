// Host twin of kernels_cu/ptx/shared_memory.cuh.
#pragma once
#include "cuda_on_cpu.h"

#define DYN_SMEM(name) unsigned char* const name = emu::running->view->shared

EMU_INLINE unsigned cvta_to_shared(const void* pointer) { return emu::shared_address(pointer); }
