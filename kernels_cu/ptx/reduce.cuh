// red: additions in global memory without an answer, relaxed, in no particular order.
#pragma once

__device__ __forceinline__ void red_add_f32(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" :: "l"(address), "f"(x) : "memory");
}

// Four neighbouring floats, 16-byte aligned (sm_90).
__device__ __forceinline__ void red_add_v4_f32(float* address, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
