// Host twin of kernels_cu/ptx/opaque.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void make_opaque(unsigned&) {}
