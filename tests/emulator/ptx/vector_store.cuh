// Host twin of kernels_cu/ptx/vector_store.cuh.
#pragma once
#include "cuda_on_cpu.h"

EMU_INLINE void st_global_v2(void* address, const unsigned (&x)[2]) {
  struct alignas(8) Vector { unsigned x[2]; };
  *static_cast<Vector*>(address) = {{x[0], x[1]}};
}
EMU_INLINE void st_global_v4(float* address, const float (&x)[4]) {
  struct alignas(16) Vector { float x[4]; };
  *reinterpret_cast<Vector*>(address) = {{x[0], x[1], x[2], x[3]}};
}
