// 16-bit floats to float32, exact.
#pragma once

__device__ __forceinline__ float cvt_f32_f16(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
